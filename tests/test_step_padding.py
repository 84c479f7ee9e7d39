"""Steps are padded to few sizes, with rows that touch nothing but the null block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_rows import Row, step

from agent.step_batch import StepBatch
from agent.step_padding import PADDING_ROW, Phase, blank_step, blank_steps, padded, phase_of, size_for, sizes_up_to

BLOCK_SIZE = 16
rows = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=9)  # new and cached tokens


def step_of(lengths: list[tuple[int, int]]) -> StepBatch:
    built = [
        Row([5 * i + 1 + j for j in range(5)], list(range(70)), computed=old) for i, (_, old) in enumerate(lengths)
    ]
    return step(built, [new for new, _ in lengths], BLOCK_SIZE)


@given(rows)
def test_a_padded_step_begins_with_the_step_and_goes_on_in_the_null_block(lengths: list[tuple[int, int]]) -> None:
    before = step_of(lengths)
    after = padded(before)
    tokens, count = before.token_ids.size, len(lengths)
    assert after.token_ids.size == size_for(tokens)
    assert after.query_lens.sum() == after.token_ids.size == after.positions.size == after.slot_mapping.size
    assert len(after.block_tables) == after.query_lens.size == after.context_lens.size
    for name in ("token_ids", "positions", "slot_mapping", "query_lens", "context_lens", "logits_indices"):
        had = getattr(before, name)
        assert np.array_equal(getattr(after, name)[: had.size], had), name
    assert np.array_equal(after.block_tables[:count, : before.block_tables.shape[1]], before.block_tables)
    assert not after.block_tables[count:].any()
    assert not after.slot_mapping[tokens:].any()
    assert np.array_equal(after.query_lens[count:], after.context_lens[count:])
    assert after.query_lens[count:].max(initial=1) <= PADDING_ROW
    assert phase_of(after) == phase_of(before)


def test_the_kind_of_a_step_is_that_of_its_rows() -> None:
    assert phase_of(step_of([(3, 0), (1, 0)])) == "prefill"
    assert phase_of(step_of([(3, 0), (1, 7)])) == "chunk"
    assert phase_of(step_of([(1, 0), (1, 7)])) == "decode"


def test_slots_that_are_not_to_be_written_go_to_the_null_block() -> None:
    batch = step_of([(3, 0)])
    batch.slot_mapping[1] = -1
    assert padded(batch).slot_mapping.tolist()[:3] == [16, 0, 18]


def test_there_are_few_sizes() -> None:
    assert list(sizes_up_to(512)) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]
    assert list(sizes_up_to(5)) == [1, 2, 4, 8]
    assert {size_for(count) for count in range(1, 513)} == set(sizes_up_to(512))


@pytest.mark.parametrize("tokens", [2, 8, 16, 384])
@pytest.mark.parametrize("phase", ["prefill", "chunk", "decode"])
def test_a_blank_step_is_of_its_kind_and_size(phase: Phase, tokens: int) -> None:
    batch = blank_step(phase, tokens, 4, 2)
    assert phase_of(batch) == phase
    assert padded(batch).token_ids.size == batch.query_lens.sum() == tokens
    assert batch.context_lens.max() <= PADDING_ROW, "a row fits the narrowest table"
    assert not batch.slot_mapping.any()
    assert not batch.block_tables.any()


@pytest.mark.parametrize("phase", ["prefill", "chunk", "decode"])
def test_blank_steps_have_every_size_of_a_step(phase: Phase) -> None:
    steps = list(blank_steps(phase, 300, 5))
    numbers = [size for size in sizes_up_to(300) if size > 1 or phase == "decode"]
    shapes = [(one.token_ids.size, one.block_tables.shape[1], one.logits_indices.size) for one in steps]
    assert {shape[:2] for shape in shapes} == {(tokens, width) for tokens in numbers for width in (1, 2, 4, 8)}
    assert {shape[::2] for shape in shapes} == {(most, some) for most in numbers for some in sizes_up_to(most)}
    assert shapes[0] == (384, 8, 384)
    for one in steps:
        assert padded(one).token_ids.size == one.token_ids.size
        assert padded(one).logits_indices.size == one.logits_indices.size
