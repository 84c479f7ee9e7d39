"""What a runner is tried with at its start: tokens in one step, and the same tokens in two that must share a cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agent.protocol import Floats
from agent.step_batch import StepBatch
from config.manifest import Manifest


def disagreement(run: Callable[[StepBatch], Floats], manifest: Manifest, *, apart: int) -> float:
    """How far the logits of three tokens in one step are from those where the last ``apart`` come in a later step.

    ``run`` gives a step's logits. The result is relative to the largest logit: the median of three tries, since tokens
    with outliers in them round to 0.1 and more; a cache that is not shared costs 0.4.
    """
    size, errors = manifest.block_size, []
    for tokens in (manifest.vocab_size * np.arange(1, 10) // 10).reshape(3, 3).tolist():
        together = run(one_row(tokens, first=0, block=1, block_size=size))
        first = len(tokens) - apart
        run(one_row(tokens[:first], first=0, block=2, block_size=size))
        separate = run(one_row(tokens[first:], first=first, block=2, block_size=size))
        errors.append(float(np.abs(together - separate).max() / np.abs(together).max()))
    return float(np.median(errors))


def one_row(tokens: list[int], *, first: int, block: int, block_size: int) -> StepBatch:
    """A step of one request whose tokens, from position ``first`` on, lie in one block; the last one's logits."""
    positions = np.arange(first, first + len(tokens), dtype=np.int32)
    one = np.ones(1, dtype=np.int32)
    return StepBatch(
        token_ids=np.array(tokens, dtype=np.int32),
        positions=positions,
        slot_mapping=positions + np.int32(block * block_size),
        block_tables=one[:, None] * block,
        query_lens=one * len(tokens),
        context_lens=one * (first + len(tokens)),
        logits_indices=one * (len(tokens) - 1),
    )
