"""Steps for a model runner, built by hand: rows of token lists on blocks that the test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agent.step_batch import StepBatch


@dataclass
class Row:
    """One request: its blocks, its tokens and how many of them are cached."""

    blocks: Sequence[int]
    tokens: list[int]
    computed: int = 0


def step(rows: Sequence[Row], lengths: Sequence[int], block_size: int, *, every_position: bool = False) -> StepBatch:
    """The next ``lengths[i]`` tokens of each row; logits of each row's last token, or of all. The rows move on."""
    tokens, positions, slots, ends = [], [], [], []
    for row, length in zip(rows, lengths, strict=True):
        span = range(row.computed, row.computed + length)
        tokens += [row.tokens[i] for i in span]
        positions += span
        slots += [row.blocks[i // block_size] * block_size + i % block_size for i in span]
        row.computed += length
        ends.append(len(tokens) - 1)
    width = max(len(row.blocks) for row in rows)
    return StepBatch(
        token_ids=np.array(tokens, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        slot_mapping=np.array(slots, dtype=np.int32),
        block_tables=np.array([[*row.blocks, *[0] * (width - len(row.blocks))] for row in rows], dtype=np.int32),
        query_lens=np.array(lengths, dtype=np.int32),
        context_lens=np.array([row.computed for row in rows], dtype=np.int32),
        logits_indices=np.arange(len(tokens), dtype=np.int32) if every_position else np.array(ends, dtype=np.int32),
    )
