"""No plan gets past the check with a number that could not be indexed with."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_plans import PlanRow, Sequenced, make_plan

from agent.protocol import SamplingParams, SeatReset, StepPlan, ints, pack_ints
from agent.step_batch import PlanError, StepShapes, read_plan

SHAPES = StepShapes(
    vocab_size=100, context_length=64, block_size=16, num_blocks=10, max_num_seqs=4, max_num_batched_tokens=40
)
ARRAYS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "block_tables",
    "query_lens",
    "context_lens",
    "seats",
    "sampled_rows",
    "logits_indices",
    "prompt_targets",
)


def good_plan() -> StepPlan:
    """A chunk on cached context, a prompt with known successors, and a decoding row."""
    rows = [
        PlanRow(seat=3, tokens=[5, 6, 7], start=20, blocks=[1, 2], sampled=False),
        PlanRow(seat=0, tokens=[9, 8, 7], start=0, blocks=[3], known={0: 8, 1: 7}),
        PlanRow(seat=1, tokens=[99], start=63, blocks=[4, 5, 6, 9]),
    ]
    reset = Sequenced(seat=0, tokens=[9, 8, 7], blocks=[3]).reset()
    return make_plan(rows, resets=[reset], top=2)


def changed(**fields: list[int]) -> StepPlan:
    return msgspec.structs.replace(good_plan(), **{name: pack_ints(values) for name, values in fields.items()})


def test_a_good_plan_is_read_as_it_is() -> None:
    batch, sampling = read_plan(good_plan(), SHAPES)
    assert batch.token_ids.tolist() == [5, 6, 7, 9, 8, 7, 99]
    assert batch.positions.tolist() == [20, 21, 22, 0, 1, 2, 63]
    assert batch.slot_mapping.tolist() == [36, 37, 38, 48, 49, 50, 159]
    assert batch.block_tables.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 9]]
    assert batch.context_lens.tolist() == [23, 3, 64]
    assert batch.logits_indices.tolist() == [5, 6, 3, 4]
    assert sampling.seats.tolist() == [0, 1]
    assert sampling.prompt_targets.tolist() == [8, 7]
    assert sampling.prompt_top_logprobs == 2


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"token_ids": [5, 6, 7, 9, 8, 7, 100]}, "token_ids: 100 is outside 0 … 99"),
        ({"token_ids": [5, 6, 7, 9, 8, 7, -2]}, "token_ids: -2"),
        ({"token_ids": [5, -1, 7, 9, 8, 7, 6]}, "token_ids: a latest token is not the last of its row"),
        ({"block_copies": [1, 2, 3]}, "block_copies: not pairs"),
        ({"block_copies": [1, 10]}, "block_copies: 10"),
        ({"block_copies": [0, 2]}, "block_copies: 0"),
        ({"positions": [20, 21, 22, 0, 1, 2, 64]}, "positions: 64"),
        ({"positions": [20]}, "positions: not one for each token"),
        ({"slot_mapping": [36, 37, 38, 48, 49, 50, 160]}, "slot_mapping: 160"),
        ({"slot_mapping": [36, 37, 38, 48, 49, 50, -2]}, "slot_mapping: -2"),
        ({"slot_mapping": [1, 2]}, "slot_mapping: not one"),
        ({"block_tables": [1, 2, 0, 0, 3, 0, 0, 0, 4, 5, 6, 10]}, "block_tables: 10"),
        ({"block_tables": [1, 2, 3, 4]}, "block_tables: 4 numbers do not fit 3 rows"),
        ({"block_tables": []}, "block_tables: empty"),
        ({"query_lens": [3, 3, 2]}, "query_lens"),
        ({"query_lens": [3, 4, 0]}, "query_lens: 0"),
        ({"query_lens": []}, "do not fit 0 rows"),
        ({"context_lens": [23, 3, 65]}, "context_lens: 65"),
        ({"context_lens": [2, 3, 64]}, "context_lens: shorter"),
        ({"context_lens": [23, 3]}, "context_lens: not one"),
        ({"block_tables": [1, 2, 3]}, "context_lens: 23 is outside 1 … 16"),
        ({"seats": [3, 0, 4]}, "seats: 4"),
        ({"seats": [3, 0, 0]}, "seats: two rows share one"),
        ({"seats": [3, 0]}, "seats: not one"),
        ({"sampled_rows": [1, 3]}, "sampled_rows: 3"),
        ({"sampled_rows": [1, 1]}, "sampled_rows: a row is listed twice"),
        ({"sampled_rows": [2, 1]}, "logits_indices: not the last tokens"),
        ({"logits_indices": [5, 6, 3, 7]}, "logits_indices: 7"),
        ({"logits_indices": [5, 6, 3]}, "logits_indices: not S"),
        ({"prompt_targets": [8, 100]}, "prompt_targets: 100"),
        ({"prompt_targets": [8] * 30, "logits_indices": [5, 6] + [3] * 30}, "more than two"),
    ],
)
def test_each_wrong_number_is_named(fields: dict[str, list[int]], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        read_plan(changed(**fields), SHAPES)


@pytest.mark.parametrize(
    ("reset", "problem"),
    [
        (SeatReset(seat=4, params=SamplingParams(), prompt_ids=b"", output_ids=b""), "seat 4"),
        (SeatReset(seat=0, params=SamplingParams(), prompt_ids=pack_ints([100]), output_ids=b""), "prompt_ids: 100"),
        (SeatReset(seat=0, params=SamplingParams(), prompt_ids=b"", output_ids=pack_ints([-1])), "output_ids: -1"),
        (
            SeatReset(seat=0, params=SamplingParams(end_token_ids=(100,)), prompt_ids=b"", output_ids=b""),
            "end_token_ids",
        ),
        (
            SeatReset(seat=0, params=SamplingParams(logit_bias=((-1, 1.0),)), prompt_ids=b"", output_ids=b""),
            "logit_bias: .* no tokens",
        ),
        (
            SeatReset(seat=0, params=SamplingParams(logit_bias=((1, 1.0),) * 2), prompt_ids=b"", output_ids=b""),
            "logit_bias: a token is listed twice",
        ),
        (
            SeatReset(seat=0, params=SamplingParams(logit_bias=((1, np.inf),)), prompt_ids=b"", output_ids=b""),
            "logit_bias: not finite",
        ),
        (SeatReset(seat=0, params=SamplingParams(), prompt_ids=b"12345", output_ids=b""), "prompt_ids: 5 bytes"),
    ],
)
def test_each_wrong_reset_is_named(reset: SeatReset, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        read_plan(msgspec.structs.replace(good_plan(), resets=(reset,)), SHAPES)


def test_more_than_the_agent_takes() -> None:
    with pytest.raises(PlanError, match="5 rows"):
        read_plan(make_plan([PlanRow(seat, [1], 0, [1]) for seat in range(5)]), SHAPES)
    with pytest.raises(PlanError, match="41 tokens"):
        read_plan(make_plan([PlanRow(0, [1] * 41, 0, [1, 2, 3])]), SHAPES)
    with pytest.raises(PlanError, match="prompt_top_logprobs"):
        read_plan(msgspec.structs.replace(good_plan(), prompt_top_logprobs=101), SHAPES)


numbers = st.integers(-3, 12) | st.sampled_from([-(2**31), 2**31 - 1, 99, 100, 159, 160])


@given(st.dictionaries(st.sampled_from(ARRAYS), st.lists(numbers, max_size=12).map(pack_ints) | st.binary(max_size=9)))
def test_whatever_passes_can_be_indexed_with(fields: dict[str, bytes]) -> None:
    plan = msgspec.structs.replace(good_plan(), **fields)
    try:
        batch, sampling = read_plan(plan, SHAPES)
    except PlanError:
        return
    tokens, rows = batch.token_ids.size, batch.query_lens.size
    assert batch.query_lens.sum() == tokens
    assert (batch.context_lens <= batch.block_tables.shape[1] * 16).all()
    for values, low, high in [
        (batch.token_ids, 0, 99),
        (batch.positions, 0, 63),
        (batch.slot_mapping, -1, 159),
        (batch.block_tables, 0, 9),
        (batch.query_lens, 1, tokens),
        (batch.context_lens, 1, 64),
        (batch.logits_indices, 0, tokens - 1),
        (sampling.seats, 0, 3),
        (sampling.prompt_targets, 0, 99),
    ]:
        assert all(low <= value <= high for value in values.flat)
    assert batch.block_tables.shape[0] == rows
    assert batch.logits_indices.size == sampling.seats.size + sampling.prompt_targets.size
    assert ints(plan.sampled_rows).size == sampling.seats.size
