"""Whether a model's graphs work on one cache: a token that comes after others sees what those wrote."""

from __future__ import annotations

import logging

import numpy as np

from agent.runner import Runner
from agent.step_batch import StepBatch
from config.manifest import ManifestError

# Of the start-up proof, relative to the largest logit: sums in another order may round what is cached differently
LOGIT_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2, "int8": 5e-2}

logger = logging.getLogger(__name__)


def prove_sharing(
    runner: Runner, tolerance: float, *, otherwise: str, advice: str, phase: str = "decode", apart: int = 1
) -> None:
    """See that the graphs of prefill and ``phase`` work on one cache and one set of weights, and log that they do.

    Raises:
        ManifestError: their error is beyond ``tolerance``; ``otherwise`` is what that means, ``advice`` what to do.
    """
    error = sharing_error(runner, apart=apart)
    if not error <= tolerance:
        differ = f"logits differ by {error:.1g} of the largest"
        raise ManifestError(f"{runner.manifest.name}: {otherwise} ({differ}); {advice}")
    logger.info("prefill and %s share cache and weights: logits agree to %.1g of the largest", phase, error)


def sharing_error(runner: Runner, *, apart: int = 1) -> float:
    """How far the last of three tokens' logits are from those of one prefill if ``apart`` tokens come in a later step.

    Relative to the largest logit, the median of three tries in blocks 1 and 2: tokens with outliers in them round to
    0.1 and more; a lost cache costs 0.4.
    """
    size, vocab = runner.manifest.block_size, runner.manifest.vocab_size
    errors = []
    for tokens in (vocab * np.arange(1, 10) // 10).reshape(3, 3).tolist():
        together = runner.run(one_row(tokens, first=0, block=1, block_size=size)).values
        first = len(tokens) - apart
        runner.run(one_row(tokens[:first], first=0, block=2, block_size=size))
        separate = runner.run(one_row(tokens[first:], first=first, block=2, block_size=size)).values
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
