"""Rows of a step as the arrays of a plan."""

from __future__ import annotations

from agent.protocol import LATEST_TOKEN, SamplingParams, SeatReset, StepPlan, ints, pack_ints
from server.request import GenerationParams, Request
from server.step import Row, Step
from server.step_plan import make_plan, make_probe


def request(
    prompt: list[int], output: list[int], table: list[int], seat: int, params: GenerationParams | None = None
) -> Request:
    return Request(
        request_id="",
        prompt_ids=prompt,
        params=params or GenerationParams(),
        arrival=0.0,
        max_new_tokens=10,
        output_ids=output,
        block_table=table,
        seat=seat,
    )


def arrays(plan: StepPlan) -> dict[str, list[int]]:
    names = [name for name in StepPlan.__struct_fields__ if isinstance(getattr(plan, name), bytes)]
    return {name: ints(getattr(plan, name)).tolist() for name in names}


def test_a_decoding_row_and_a_chunk_that_crosses_blocks() -> None:
    decoding = request([10, 11, 12], [13, 14], [5, 2], seat=3)
    prompt = request([20, 21, 22, 23, 24, 25, 26], [], [7, 1], seat=0)
    step = Step(9, (Row(decoding, 4, 1, True), Row(prompt, 2, 4, False)), admitted=())
    plan = make_plan(step, block_size=4)
    assert plan.step_id == 9
    assert plan.resets == ()
    assert arrays(plan) == {
        "token_ids": [14, 22, 23, 24, 25],
        "positions": [4, 2, 3, 4, 5],
        "slot_mapping": [2 * 4, 7 * 4 + 2, 7 * 4 + 3, 1 * 4, 1 * 4 + 1],
        "block_tables": [5, 2, 7, 1],
        "query_lens": [1, 4],
        "context_lens": [5, 6],
        "seats": [3, 0],
        "sampled_rows": [0],
        "logits_indices": [0],
        "prompt_targets": [],
        "block_copies": [],
    }


def test_a_token_that_is_not_known_yet_is_left_to_the_agent() -> None:
    known = request([10, 11, 12], [13], [5], seat=3)
    pending = request([20, 21], [22], [7], seat=1)
    step = Step(2, (Row(known, 3, 1, True), Row(pending, 3, 1, True)), block_copies=((4, 5), (6, 7)))
    plan = make_plan(step, block_size=8)
    assert arrays(plan)["token_ids"] == [13, LATEST_TOKEN]
    assert arrays(plan)["positions"] == [3, 3]
    assert arrays(plan)["block_copies"] == [4, 5, 6, 7]


def test_a_recomputed_row_runs_from_prompt_into_answer_and_takes_its_seat_again() -> None:
    params = GenerationParams(sampling=SamplingParams(temperature=0.5, seed=8))
    again = request([10, 11, 12], [13, 14], [3], seat=1, params=params)
    short = request([1], [], [4], seat=2)
    step = Step(1, (Row(short, 0, 1, True), Row(again, 1, 4, True)), admitted=(again,))
    plan = make_plan(step, block_size=8)
    assert plan.resets == (
        SeatReset(seat=1, params=params.sampling, prompt_ids=pack_ints([10, 11, 12]), output_ids=pack_ints([13, 14])),
    )
    assert arrays(plan)["token_ids"] == [1, 11, 12, 13, 14]
    assert arrays(plan)["logits_indices"] == [0, 4]


def test_tables_are_padded_with_the_null_block() -> None:
    rows = tuple(Row(request([1], [], table, seat=i), 0, 1, True) for i, table in enumerate(([4, 9, 2], [6], [1, 3])))
    plan = make_plan(Step(1, rows, admitted=()), block_size=4)
    assert arrays(plan)["block_tables"] == [4, 9, 2, 6, 0, 0, 1, 3, 0]


def test_prompt_log_probabilities_come_after_the_sampled_rows() -> None:
    params = GenerationParams(prompt_logprobs=True, prompt_top_logprobs=2)
    plain = request([1, 2], [], [1], seat=0, params=GenerationParams(prompt_top_logprobs=9))
    scored = request([5, 6, 7, 8], [], [2], seat=1, params=params)
    rows = (Row(plain, 0, 2, True), Row(scored, 0, 4, True, range(1, 3)))
    plan = make_plan(Step(1, rows, admitted=()), block_size=4)
    assert arrays(plan)["logits_indices"] == [1, 5, 3, 4]
    assert arrays(plan)["prompt_targets"] == [7, 8]
    assert plan.prompt_top_logprobs == 2  # the most that one of those rows wants


def test_a_probe_touches_the_null_block_alone() -> None:
    probe = arrays(make_probe())
    assert probe["slot_mapping"] == [0]
    assert probe["block_tables"] == [0]
    assert (probe["query_lens"], probe["context_lens"]) == ([1], [1])
