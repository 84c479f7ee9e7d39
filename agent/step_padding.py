"""Steps brought to a few sizes: on an NPU every new shape costs an operator its preparation.

Padding is made of rows like all others: they have tokens of their own, write to the null block and read from it, and
nobody asks for their logits. So it depends on no operator's way with negative slots or lengths that do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from agent.protocol import Ints
from agent.step_batch import StepBatch

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


def padded(batch: StepBatch) -> StepBatch:
    """The same step with as many tokens, wanted positions and blocks a row as ``size_for`` and ``doubled`` say.

    A decode step stays one. The number of rows is what it comes to in others: it is in the shape of no matrix. The
    logits of the step come first among those that are wanted of it.
    """
    missing = size_for(batch.token_ids.size) - batch.token_ids.size
    longest = 1 if phase_of(batch) == "decode" else PADDING_ROW
    lengths = row_lengths(missing, longest)
    rows, tokens = batch.query_lens.size + lengths.size, batch.token_ids.size + missing
    return StepBatch(
        token_ids=grown(batch.token_ids, tokens),
        positions=grown(batch.positions, tokens),
        slot_mapping=grown(np.maximum(batch.slot_mapping, 0), tokens),
        block_tables=grown(batch.block_tables, rows, doubled(batch.block_tables.shape[1])),
        query_lens=np.concatenate((batch.query_lens, lengths)),
        context_lens=np.concatenate((batch.context_lens, lengths)),
        logits_indices=grown(batch.logits_indices, size_for(max(1, batch.logits_indices.size))),
    )


def grown(array: Ints, *shape: int) -> Ints:
    """The array with zeros behind it up to ``shape``: token 0 at position 0, the null block and its first slot."""
    return np.pad(array, [(0, size - had) for size, had in zip(shape, array.shape, strict=True)])


def blank_steps(phase: Phase, most_tokens: int, most_blocks: int) -> Iterator[StepBatch]:
    """Steps in which every number of tokens meets every width of block tables and every number of wanted positions.

    The largest first. No operator's shape is made of all three numbers, so not every combination of them is there.
    """
    widths = [1 << power for power in reversed(range(doubled(most_blocks).bit_length()))]
    for tokens in reversed(list(sizes_up_to(most_tokens))):
        if tokens == 1 and phase != "decode":
            continue
        wanted = list(reversed(list(sizes_up_to(tokens))))
        for i in range(max(len(widths), len(wanted))):
            yield blank_step(phase, tokens, widths[i % len(widths)], wanted[i % len(wanted)])


def blank_step(phase: Phase, tokens: int, blocks: int, wanted: int) -> StepBatch:
    """A step of a graph that touches nothing but the null block: ``tokens`` new ones, rows of ``blocks`` blocks.

    No row needs more than one block; before those of the chunk graph there is one cached token.
    """
    longest = 1 if phase == "decode" else PADDING_ROW - (phase == "chunk")
    lengths = row_lengths(tokens, longest)
    return StepBatch(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        slot_mapping=np.zeros(tokens, np.int32),
        block_tables=np.zeros((lengths.size, blocks), np.int32),
        query_lens=lengths,
        context_lens=lengths + np.int32(phase == "chunk"),
        logits_indices=np.zeros(wanted, np.int32),
    )


def row_lengths(tokens: int, longest: int) -> Ints:
    """So many tokens in rows of ``longest``; the last one has what is left."""
    return np.diff(np.arange(0, tokens, longest, dtype=np.int32), append=np.int32(tokens))
