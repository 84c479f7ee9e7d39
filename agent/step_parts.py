"""A step in several calls, for graphs of standard operators: what they need of memory grows with rows times tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from agent.protocol import Ints
from agent.step_batch import StepBatch

MAX_KEYS = 1 << 13  # of all rows of one token in a call, in which a layer's keys are copied several times
MAX_SCORES = 1 << 18  # of one head in a call: 1 MB, which MindSpore holds many times a layer


def cached_columns(batch: StepBatch, block_size: int) -> Ints:
    """The columns of the block tables that hold cached tokens; at least one, as a graph has no empty dimension."""
    cached = int((batch.context_lens - batch.query_lens).max())
    return batch.block_tables[:, : max(1, -(-cached // block_size))]


def fits_one_call(batch: StepBatch, block_size: int) -> bool:
    """Whether standard operators can take a step at once: they look from every token at every row's keys."""
    rows, tokens = batch.query_lens.size, batch.token_ids.size
    keys = rows * cached_columns(batch, block_size).shape[1] * block_size
    return keys <= MAX_KEYS and tokens * (keys + tokens) <= MAX_SCORES


def parts_of(batch: StepBatch, block_size: int) -> Iterator[tuple[StepBatch, Ints]]:
    """The step in several: rows of one token with others of like length, every other row alone.

    Each part comes with the positions of its logits among those of the whole step.
    """
    ends = np.cumsum(batch.query_lens)
    longer = np.flatnonzero(batch.query_lens > 1)
    for rows in (*rows_of_like_length(batch, block_size), *longer[:, None]):
        tokens = np.concatenate([np.arange(ends[row] - batch.query_lens[row], ends[row]) for row in rows])
        positions = np.flatnonzero(np.isin(batch.logits_indices, tokens))
        yield (
            StepBatch(
                token_ids=batch.token_ids[tokens],
                positions=batch.positions[tokens],
                slot_mapping=batch.slot_mapping[tokens],
                block_tables=batch.block_tables[rows],
                query_lens=batch.query_lens[rows],
                context_lens=batch.context_lens[rows],
                logits_indices=np.searchsorted(tokens, batch.logits_indices[positions]).astype(np.int32),
            ),
            positions.astype(np.int32),
        )


def rows_of_like_length(batch: StepBatch, block_size: int) -> Iterator[NDArray[np.intp]]:
    """The rows of one token in groups, shortest contexts first: a group is padded to its longest row."""
    rows = np.flatnonzero(batch.query_lens == 1)
    rows = rows[np.argsort(batch.context_lens[rows], kind="stable")]
    first = 0
    for i, row in enumerate(rows):
        padded = -(-int(batch.context_lens[row]) // block_size) * block_size
        if i > first and (i + 1 - first) * padded > MAX_KEYS:
            yield np.sort(rows[first:i])
            first = i
    if rows.size:
        yield np.sort(rows[first:])
