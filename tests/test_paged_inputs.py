"""Steps in the inputs of a paged pair: whatever a step holds, its calls make of it what the step itself says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_rows import Row, step

from agent.paged_inputs import CallLimits, PagedCall, paged_calls
from agent.protocol import Ints
from agent.step_batch import StepBatch

BLOCK = 4
LIMITS = CallLimits(prompts=2, prompt_tokens=8, tokens=4, padding_slot=0)


def calls(batch: StepBatch, limits: CallLimits = LIMITS) -> list[PagedCall]:
    return list(paged_calls(batch, limits))


def test_a_prompt_and_a_decoding_row_by_hand() -> None:
    prompt, decoding = Row([3, 5], [11, 12, 13, 14, 15, 16]), Row([2, 4], [21, 22, 23, 24, 25, 26], computed=5)
    prefill, decode = calls(step([prompt, decoding], [6, 1], BLOCK))
    assert prefill.phase == "prefill"
    assert prefill.token_ids.tolist() == [[11, 12, 13, 14, 15, 16]]
    assert prefill.valid_lengths.tolist() == [6]
    assert prefill.slot_mapping.tolist() == [[12, 13, 14, 15, 20, 21]]
    assert (prefill.rows.tolist(), prefill.places.tolist()) == ([0], [0])
    assert decode.phase == "decode"
    assert decode.token_ids.tolist() == [[26]]
    assert decode.valid_lengths.tolist() == [6]
    assert decode.block_tables.tolist() == [[2, 4]]
    assert decode.slot_mapping.tolist() == [[17]]
    assert (decode.rows.tolist(), decode.places.tolist()) == ([0], [1])


def test_a_chunk_on_cached_context_is_decoded_token_by_token() -> None:
    [first, second] = calls(step([Row([3, 5], list(range(8)), computed=2)], [6], BLOCK))
    assert [call.phase for call in (first, second)] == ["decode", "decode"]
    assert first.token_ids.tolist() == [[2], [3], [4], [5]]
    assert first.valid_lengths.tolist() == [3, 4, 5, 6]
    assert first.block_tables.tolist() == [[3, 5]] * 4
    assert first.rows.size == 0, "no logits are wanted yet"
    assert second.valid_lengths.tolist() == [7, 8]
    assert (second.rows.tolist(), second.places.tolist()) == ([1], [0])


@pytest.mark.parametrize("slot", [0, -1])
def test_padding_has_the_slot_that_the_graphs_want(slot: int) -> None:
    [call] = calls(step([Row([3], [11, 12, 13])], [3], BLOCK), replace(LIMITS, padding_slot=slot))
    padded = call.padded(rows=2, length=5, width=3)
    assert padded.token_ids.tolist() == [[11, 12, 13, 0, 0], [0] * 5]
    assert padded.valid_lengths.tolist() == [3, 1]
    assert padded.slot_mapping.tolist() == [[12, 13, 14, slot, slot], [slot] * 5]
    assert padded.block_tables.tolist() == [[3, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="negative"):
        call.padded(rows=1, length=2, width=1)


@pytest.mark.parametrize("slot", [0, -1])
def test_what_is_not_to_be_written_is_padding(slot: int) -> None:
    batch = step([Row([3], [11, 12])], [2], BLOCK)
    batch.slot_mapping[0] = -1
    assert calls(batch, replace(LIMITS, padding_slot=slot))[0].slot_mapping.tolist() == [[slot, 13]]


class Written:
    """A pair without a network: the logits of a token are all tokens of its row so far, as its cache has them."""

    def __init__(self) -> None:
        self.slots = np.full(100 * BLOCK, -1, np.int32)

    def run(self, call: PagedCall) -> list[list[int]]:
        """The tokens that each row of the call has attended to."""
        self.slots[call.slot_mapping] = call.token_ids
        lengths = call.valid_lengths.tolist()
        if call.phase == "prefill":
            return [row[:length].tolist() for row, length in zip(call.token_ids, lengths, strict=True)]
        return [self._read(table)[:length] for table, length in zip(call.block_tables, lengths, strict=True)]

    def _read(self, table: Ints) -> list[int]:
        read: list[int] = self.slots.reshape(-1, BLOCK)[table].reshape(-1).tolist()
        return read


@st.composite
def chunked(draw: st.DrawFn) -> tuple[list[Row], list[list[int]]]:
    """Rows, and how many tokens of each take part in each step."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    rows = [
        Row(list(range(1 + 5 * i, 6 + 5 * i)), [100 * i + place for place in range(length)])
        for i, length in enumerate(lengths)
    ]
    steps = []
    while any(lengths):
        taken = [draw(st.integers(min(1, left), left)) for left in lengths]
        lengths = [left - took for left, took in zip(lengths, taken, strict=True)]
        steps.append(taken)
    return rows, steps


@settings(max_examples=30, deadline=None)
@given(
    chunked(),
    st.booleans(),
    st.builds(
        CallLimits,
        prompts=st.integers(1, 3),
        prompt_tokens=st.integers(1, 9),
        tokens=st.integers(1, 5),
        padding_slot=st.just(0),
    ),
)
def test_every_token_sees_what_is_before_it(
    chunks: tuple[list[Row], list[list[int]]], every_position: bool, limits: CallLimits
) -> None:
    rows, steps = chunks
    pair = Written()
    for taken in steps:
        going = [(row, count) for row, count in zip(rows, taken, strict=True) if count]
        batch = step([row for row, _ in going], [count for _, count in going], BLOCK, every_position=every_position)
        answers: dict[int, list[int]] = {}
        for call in calls(batch, limits):
            check_limits(call, limits)
            padded = call.padded(rows=call.token_ids.shape[0] + 2, length=call.token_ids.shape[1] + 1, width=7)
            seen = pair.run(padded if call.phase == "prefill" else call)
            answers |= dict(zip(call.places.tolist(), (seen[row] for row in call.rows), strict=True))
        assert [answers[place] for place in range(batch.logits_indices.size)] == expected(batch, rows)


def check_limits(call: PagedCall, limits: CallLimits) -> None:
    rows, length = call.token_ids.shape
    assert rows <= (limits.prompts if call.phase == "prefill" else limits.tokens)
    assert length <= (limits.prompt_tokens if call.phase == "prefill" else 1)


def expected(batch: StepBatch, rows: Sequence[Row]) -> list[list[int]]:
    """What each wanted token has before it, itself included: tokens name their row and place."""
    tokens = batch.token_ids[batch.logits_indices].tolist()
    return [rows[token // 100].tokens[: token % 100 + 1] for token in tokens]
