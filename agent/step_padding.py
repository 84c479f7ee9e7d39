"""Steps brought to a few sizes: on an NPU every new shape costs an operator its preparation.

Padding is made of rows like all others: they have tokens of their own, write to the null block and read from it, and
nobody asks for their logits. So it depends on no operator's way with negative slots, rows without tokens or lengths
that do not add up. Where a step needs rows but no tokens, rows that read the cache are cut in two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from agent.protocol import Ints
from agent.step_batch import StepBatch
from config.serving_config import LimitsConfig

Phase = Literal["prefill", "chunk", "decode"]
PADDING_ROW = 16  # tokens at most: no block of an exported model is smaller
FINE = 128  # tokens: up to here sizes double, from here on they are its multiples


def phase_of(batch: StepBatch) -> Phase:
    """Which graph a step is for."""
    if batch.query_lens.size == batch.token_ids.size:
        return "decode"
    return "prefill" if np.array_equal(batch.query_lens, batch.context_lens) else "chunk"


def size_for(count: int) -> int:
    """The size that a dimension of ``count`` is brought to: a power of two, or a multiple of 128."""
    return -(-count // FINE) * FINE if count > FINE else doubled(count)


def doubled(count: int) -> int:
    """The power of two that ``count`` is brought to."""
    return 1 << (count - 1).bit_length()


def sizes_up_to(count: int) -> Iterator[int]:
    """All sizes that a dimension of at most ``count`` can be brought to."""
    size = 0
    while size < count:
        size = size_for(size + 1)
        yield size


def padded_sizes(phase: Phase, tokens: int, rows: int) -> tuple[int, int]:
    """How many tokens and rows a step is brought to: both ``size_for``, and in a decode step the same."""
    size = size_for(tokens)
    if phase == "decode":
        return size, size
    while phase == "prefill" and rows_for(rows, size - tokens) - rows > size - tokens:
        size = size_for(size + 1)  # a row has a token at least, and these rows cannot be cut
    return size, rows_for(rows, size - tokens)


def rows_for(rows: int, missing: int) -> int:
    """The number of rows where ``missing`` tokens are added in rows of their own."""
    return size_for(rows + -(-missing // PADDING_ROW))


def padded(batch: StepBatch, most_blocks: int) -> StepBatch:
    """The same step with as many tokens, rows and wanted positions as ``padded_sizes`` and ``size_for`` say.

    No row of any step has more than ``most_blocks``. The logits of the step come first among those that are wanted.
    """
    phase = phase_of(batch)
    tokens, rows = padded_sizes(phase, batch.token_ids.size, batch.query_lens.size)
    missing = tokens - batch.token_ids.size
    if phase == "chunk":
        batch = cut(batch, max(0, rows - batch.query_lens.size - missing))
    lengths = spread(missing, rows - batch.query_lens.size)
    width = table_widths(phase, batch.block_tables.shape[1] if phase == "decode" else most_blocks)[0]
    return StepBatch(
        token_ids=grown(batch.token_ids, tokens),
        positions=grown(batch.positions, tokens),
        slot_mapping=grown(np.maximum(batch.slot_mapping, 0), tokens),
        block_tables=grown(batch.block_tables[:, :width], rows, width),
        query_lens=np.concatenate((batch.query_lens, lengths)),
        context_lens=np.concatenate((batch.context_lens, lengths)),
        logits_indices=grown(batch.logits_indices, size_for(max(1, batch.logits_indices.size))),
    )


def cut(batch: StepBatch, count: int) -> StepBatch:
    """The same step in ``count`` rows more: the last tokens of long rows as rows of their own.

    For a graph whose attention reads the cache alone: it holds all tokens of a step before any row is looked at.
    """
    taken = np.diff(np.minimum(np.cumsum(batch.query_lens - 1), count), prepend=0)  # rows that come of each
    row = np.repeat(np.arange(taken.size), taken + 1)
    first = np.cumsum(taken + 1) - (taken + 1)
    nth = np.arange(row.size) - first[row]  # 0: what is left of the row
    return replace(
        batch,
        block_tables=batch.block_tables[row],
        query_lens=np.where(nth == 0, (batch.query_lens - taken)[row], 1).astype(np.int32),
        context_lens=((batch.context_lens - taken)[row] + nth).astype(np.int32),
    )


def grown(array: Ints, *shape: int) -> Ints:
    """The array with zeros behind it up to ``shape``: token 0 at position 0, the null block and its first slot."""
    return np.pad(array, [(0, size - had) for size, had in zip(shape, array.shape, strict=True)])


def table_widths(phase: Phase, most_blocks: int) -> list[int]:
    """Blocks a row that block tables can have, the most first, if no row has more than ``most_blocks``.

    A prefill's attention looks at no table. That of a chunk would meet every number of tokens with every number of rows
    and every width; as its work goes by the rows' lengths, its tables are all of the greatest. In a decode step rows
    and tokens are one number.
    """
    widest = doubled(most_blocks)
    if phase == "decode":
        return [1 << power for power in reversed(range(widest.bit_length()))]
    return [1 if phase == "prefill" else widest]


def blank_steps(phase: Phase, limits: LimitsConfig, context_length: int, block_size: int) -> Iterator[StepBatch]:
    """Padded steps in which every operator of a graph meets each of its shapes, those of the most tokens first.

    Every number of tokens meets every number of rows that it can come with, every width of block tables and every
    number of wanted positions. Rows meet widths as well, since a phase leaves only one of the two open beside tokens;
    rows and wanted positions need not meet, as no operator's shape is made of both.
    """
    widths = table_widths(phase, -(-context_length // block_size))
    rows_of: dict[int, set[int]] = defaultdict(set)  # by tokens, both padded
    for tokens, rows in steps_within(phase, limits, context_length):
        size, number = padded_sizes(phase, tokens, rows)
        rows_of[size].add(number)
    for tokens in sorted(rows_of, reverse=True):
        numbers, wanted = sorted(rows_of[tokens], reverse=True), list(sizes_up_to(tokens))[::-1]
        for i in range(max(len(numbers), len(widths), len(wanted))):
            yield blank_step(phase, tokens, numbers[i % len(numbers)], widths[i % len(widths)], wanted[i % len(wanted)])


def steps_within(phase: Phase, limits: LimitsConfig, context_length: int) -> Iterator[tuple[int, int]]:
    """Numbers of tokens and of rows that the steps of a graph can have, before they are padded."""
    most = limits.max_num_batched_tokens
    if phase == "decode":
        yield from ((rows, rows) for rows in range(1, min(limits.max_num_seqs, most) + 1))
        return
    longest = context_length - (phase == "chunk")  # new tokens of a row: one at least is cached before
    for tokens in range(2, most + 1):  # with as many rows as tokens it is a decode step
        yield from ((tokens, rows) for rows in range(-(-tokens // longest), min(limits.max_num_seqs, tokens - 1) + 1))


def blank_step(phase: Phase, tokens: int, rows: int, blocks: int, wanted: int) -> StepBatch:
    """A step of a graph that touches nothing but the null block; before the rows of a chunk there is a cached token."""
    lengths = spread(tokens, rows)
    return StepBatch(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        slot_mapping=np.zeros(tokens, np.int32),
        block_tables=np.zeros((rows, blocks), np.int32),
        query_lens=lengths,
        context_lens=lengths + np.int32(phase == "chunk"),
        logits_indices=np.zeros(wanted, np.int32),
    )


def spread(tokens: int, rows: int) -> Ints:
    """So many tokens in so many rows, as evenly as may be; none in none."""
    return np.diff(np.arange(rows + 1) * tokens // max(1, rows)).astype(np.int32)
