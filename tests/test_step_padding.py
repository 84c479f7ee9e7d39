"""Steps are padded to few sizes, with rows that touch nothing but the null block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_rows import Row, step

from agent.step_batch import StepBatch
from agent.step_padding import PADDING_ROW, Phase, blank_steps, cut, padded, phase_of, size_for, sizes_up_to
from config.serving_config import LimitsConfig

BLOCK_SIZE = 16
CONTEXT_LENGTH = 70  # tokens: five blocks
MOST_BLOCKS = 5
LIMITS = LimitsConfig(max_num_seqs=9, max_num_batched_tokens=360)
PHASES: tuple[Phase, ...] = ("prefill", "chunk", "decode")
rows = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=9)  # new and cached tokens
steps = st.one_of(rows, *(st.lists(st.tuples(new, old), min_size=1, max_size=9) for new, old in (
    (st.integers(1, 40), st.just(0)), (st.just(1), st.integers(0, 30)), (st.integers(1, 4), st.integers(0, 3)),
)))  # fmt: skip


def step_of(lengths: list[tuple[int, int]]) -> StepBatch:
    built = [
        Row([5 * i + 1 + j for j in range(5)], list(range(70)), computed=old) for i, (_, old) in enumerate(lengths)
    ]
    return step(built, [new for new, _ in lengths], BLOCK_SIZE)


@given(steps)
def test_a_padded_step_begins_with_the_step_and_goes_on_in_the_null_block(lengths: list[tuple[int, int]]) -> None:
    before = step_of(lengths)
    after = padded(before, MOST_BLOCKS)
    tokens, phase = before.token_ids.size, phase_of(before)
    assert after.query_lens.sum() == after.token_ids.size == after.positions.size == after.slot_mapping.size
    assert len(after.block_tables) == after.query_lens.size == after.context_lens.size
    assert after.query_lens.min() > 0, "a row without tokens"
    for name in ("token_ids", "positions", "slot_mapping", "logits_indices"):
        had = getattr(before, name)
        assert np.array_equal(getattr(after, name)[: had.size], had), name
    assert not after.slot_mapping[tokens:].any()
    own = int(np.searchsorted(np.cumsum(after.query_lens), tokens)) + 1  # rows of the step
    assert after.query_lens[:own].sum() == tokens
    assert not after.block_tables[own:].any()
    assert np.array_equal(after.query_lens[own:], after.context_lens[own:])
    assert after.query_lens[own:].max(initial=1) <= PADDING_ROW
    if phase != "chunk":
        assert np.array_equal(after.query_lens[:own], before.query_lens)
        assert np.array_equal(after.context_lens[:own], before.context_lens)
        assert phase_of(after) == phase
    if phase != "prefill":
        assert looked_at(after)[:tokens] == looked_at(before)


def looked_at(batch: StepBatch) -> list[tuple[int, ...]]:
    """Of every token: the blocks that its row may look at up to it, then how many tokens of them."""
    found = []
    for table, new, context in zip(batch.block_tables.tolist(), batch.query_lens, batch.context_lens, strict=True):
        for length in range(context - new + 1, context + 1):
            found.append((*table[: -(-length // BLOCK_SIZE)], length))
    return found


@given(steps)
def test_every_padded_step_has_been_run_blank(lengths: list[tuple[int, int]]) -> None:
    """Nothing that an operator's shape is made of meets for the first time in service."""
    before = step_of(lengths)
    phase = phase_of(before)
    shape = shape_of(padded(before, MOST_BLOCKS))
    blank = [shape_of(one) for one in BLANK[phase]]
    assert shape[:3] in [one[:3] for one in blank], "tokens, rows and widths: attention"
    assert shape[::3] in [one[::3] for one in blank], "tokens and wanted positions: the head"


def test_a_full_step_gets_rows_but_no_tokens() -> None:
    """Rows that read the cache are cut; a prompt's cannot be, and the step has to grow."""
    chunks, prompts = step_of([(2, 3), (13, 3), (1, 5)]), step_of([(2, 0), (13, 0), (1, 0)])
    after = padded(chunks, MOST_BLOCKS)
    assert (after.query_lens.tolist(), after.context_lens.tolist()) == ([1, 1, 13, 1], [4, 5, 16, 6])
    assert padded(prompts, MOST_BLOCKS).query_lens.tolist() == [2, 13, 1, 16]


def test_a_row_is_cut_into_tokens_that_follow_each_other() -> None:
    after = cut(step_of([(1, 2), (4, 20)]), 2)
    assert (after.query_lens.tolist(), after.context_lens.tolist()) == ([1, 2, 1, 1], [3, 22, 23, 24])
    assert after.block_tables.tolist() == [[1, 2, 3, 4, 5], *[[6, 7, 8, 9, 10]] * 3]


def test_the_kind_of_a_step_is_that_of_its_rows() -> None:
    assert phase_of(step_of([(3, 0), (1, 0)])) == "prefill"
    assert phase_of(step_of([(3, 0), (1, 7)])) == "chunk"
    assert phase_of(step_of([(1, 0), (1, 7)])) == "decode"


def test_slots_that_are_not_to_be_written_go_to_the_null_block() -> None:
    batch = step_of([(3, 0)])
    batch.slot_mapping[1] = -1
    assert padded(batch, MOST_BLOCKS).slot_mapping.tolist()[:3] == [16, 0, 18]


def test_there_are_few_sizes() -> None:
    assert list(sizes_up_to(512)) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]
    assert list(sizes_up_to(5)) == [1, 2, 4, 8]
    assert {size_for(count) for count in range(1, 513)} == set(sizes_up_to(512))
    for tokens, few in ((512, [77, 65, 43]), (2048, [299, 275, 43])):
        limits = LimitsConfig(max_num_seqs=64, max_num_batched_tokens=tokens)
        assert [len(list(blank_steps(phase, limits, 4096, 128))) for phase in PHASES] == few


def shape_of(batch: StepBatch) -> tuple[int, int, int, int]:
    """Its numbers of tokens, rows, blocks a row and wanted positions."""
    return batch.token_ids.size, *batch.block_tables.shape, batch.logits_indices.size


BLANK = {phase: list(blank_steps(phase, LIMITS, CONTEXT_LENGTH, BLOCK_SIZE)) for phase in PHASES}


@pytest.mark.parametrize("phase", PHASES)
def test_a_blank_step_stays_in_the_null_block(phase: Phase) -> None:
    for batch in BLANK[phase]:
        tokens, count, width, _ = shape_of(batch)
        assert batch.query_lens.sum() == tokens
        assert batch.query_lens.size == count
        assert batch.query_lens.min() > 0
        assert np.array_equal(batch.context_lens, batch.query_lens + (phase == "chunk"))
        assert phase == "prefill" or batch.context_lens.max() <= width * BLOCK_SIZE, "a row fits its table"
        assert not batch.slot_mapping.any()
        assert not batch.block_tables.any()


def test_blank_steps_have_every_size_of_a_step() -> None:
    decode = {shape_of(one)[:3] for one in BLANK["decode"]}
    assert decode == {(count, count, width) for count in (1, 2, 4, 8, 16) for width in (1, 2, 4, 8)}
    for phase in PHASES:
        shapes = [shape_of(one) for one in BLANK[phase]]
        tokens = [shape[0] for shape in shapes]
        assert set(tokens) >= {size for size in sizes_up_to(9 if phase == "decode" else 360) if size > 1}
        assert tokens == sorted(tokens, reverse=True)
        for most in tokens:
            assert {shape[3] for shape in shapes if shape[0] == most} == set(sizes_up_to(most))
