"""The policy: who takes part in a step, and that nothing is lost on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_reader import END, VOCAB_SIZE, PlanReader, solo

from agent.protocol import SamplingParams
from server.block_manager import BlockManager
from server.request import FinishReason, GenerationParams, Request, Status
from server.scheduler import MAX_PROMPT_LOGITS, Scheduler, Step
from server.step_plan import make_plan

BLOCK_SIZE = 4
ENDS = GenerationParams(sampling=SamplingParams(end_token_ids=(END,)))
SCORED = GenerationParams(prompt_logprobs=True)


def scheduler(num_blocks: int = 100, seats: int = 8, budget: int = 64) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, BLOCK_SIZE), max_num_seqs=seats, max_num_batched_tokens=budget)


def request(length: int, max_new_tokens: int = 8, params: GenerationParams = ENDS, name: str = "") -> Request:
    prompt = [(length + i) % VOCAB_SIZE for i in range(length)]
    return Request(request_id=name, prompt_ids=prompt, params=params, arrival=0.0, max_new_tokens=max_new_tokens)


def shares(step: Step | None) -> list[tuple[Request, int, bool]]:
    assert step
    return [(row.request, row.num_new_tokens, row.samples) for row in step.rows]


def run(policy: Scheduler, token: int = 1) -> Step:
    """One step in which every sampled row gets ``token``."""
    step = policy.schedule()
    assert step
    policy.update(step, [token for row in step.rows if row.samples])
    return step


def test_a_prompt_beyond_the_budget_is_cut_and_samples_at_its_end() -> None:
    policy, long = scheduler(budget=4), request(10)
    policy.add(long)
    assert shares(run(policy)) == [(long, 4, False)]
    assert shares(run(policy)) == [(long, 4, False)]
    assert long.output_ids == []
    assert shares(run(policy)) == [(long, 2, True)]
    assert long.output_ids == [1]
    assert shares(run(policy)) == [(long, 1, True)]


def test_decoding_rows_come_before_a_running_prompt() -> None:
    policy, long, short = scheduler(budget=8, seats=3), request(20), request(5)
    policy.add(short)
    policy.add(long)
    assert shares(run(policy)) == [(short, 5, True), (long, 3, False)]
    assert shares(run(policy)) == [(short, 1, True), (long, 7, False)]
    policy.add(late := request(2))
    assert shares(run(policy)) == [(short, 1, True), (long, 7, False)]
    assert shares(run(policy)) == [(short, 1, True), (long, 3, True), (late, 2, True)]


def test_a_decoding_row_goes_before_a_prompt_that_came_first() -> None:
    policy, long, short = scheduler(budget=400), request(300, params=SCORED), request(5)
    policy.add(long)
    policy.add(short)
    assert shares(run(policy)) == [(long, MAX_PROMPT_LOGITS, False), (short, 5, True)]
    assert shares(policy.schedule()) == [(short, 1, True), (long, 300 - MAX_PROMPT_LOGITS, True)]


def test_there_are_never_more_rows_than_tokens() -> None:
    policy = scheduler(seats=8, budget=2)
    requests = [request(1) for _ in range(3)]
    for one in requests:
        policy.add(one)
    for _ in range(3):
        assert [row.request for row in run(policy).rows] == requests[:2]


def test_admission_waits_for_a_seat_in_the_order_of_arrival() -> None:
    policy = scheduler(seats=2)
    requests = [request(3, max_new_tokens=1 + i) for i in range(4)]
    for one in requests:
        policy.add(one)
    assert run(policy).admitted == tuple(requests[:2])
    assert run(policy).admitted == (requests[2],)
    assert [one.seat for one in requests] == [None, None, 0, None]
    assert run(policy).admitted == (requests[3],)
    assert requests[3].seat == 1


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    policy = scheduler(num_blocks=6)
    running, large, small = request(9), request(9), request(1)
    for one in (running, large, small):
        policy.add(one)
    assert [row.request for row in run(policy).rows] == [running]
    policy.finish(running, "abort")
    assert [row.request for row in run(policy).rows] == [large, small]


def test_an_admission_leaves_a_block_for_each_running_row() -> None:
    policy = scheduler(num_blocks=1 + 5)
    first, second = request(8), request(12)
    policy.add(first)
    run(policy)
    policy.add(second)  # its three blocks are free, but the first request needs one of them right now
    assert [row.request for row in run(policy).rows] == [first]


def test_the_latest_arrival_makes_room_and_keeps_its_answer() -> None:
    policy = scheduler(num_blocks=1 + 4)
    first, second = request(4), request(3)
    policy.add(first)
    policy.add(second)
    run(policy)  # one block each, and two to spare
    for _ in range(3):
        run(policy)
    assert (len(first.block_table), len(second.block_table)) == (2, 2)
    run(policy)
    step = policy.schedule()  # the first request's ninth token needs a third block
    assert shares(step) == [(first, 1, True)]
    assert step
    assert step.num_preempted == 1
    assert (second.status, second.num_preemptions, second.num_computed_tokens) == (Status.WAITING, 1, 0)
    assert second.output_ids == [1] * 5
    assert second.block_table == []
    policy.update(step, [END])
    again = policy.schedule()
    assert again
    assert again.admitted == (second,)
    assert shares(again) == [(second, 3 + 5, True)]


def test_preempted_requests_queue_in_the_order_of_arrival() -> None:
    policy = scheduler()
    requests = [request(4) for _ in range(4)]
    for one in requests[:3]:
        policy.add(one)
    run(policy)
    policy.add(requests[3])
    policy.requeue()
    assert policy.unfinished == requests
    policy.check()
    assert policy.blocks.num_used == 0
    assert run(policy).admitted == tuple(requests)
    assert requests[0].output_ids == [1, 1]


@pytest.mark.parametrize(
    ("token", "max_new_tokens", "reason"), [(END, 5, "stop"), (1, 1, "length"), (END, 1, "stop"), (1, 2, None)]
)
def test_how_an_answer_ends(token: int, max_new_tokens: int, reason: FinishReason | None) -> None:
    policy, one = scheduler(), request(4, max_new_tokens)
    policy.add(one)
    step = policy.schedule()
    assert step
    assert policy.update(step, [token]) == ([one] if reason else [])
    assert one.finish_reason == reason
    assert one.output_ids == [token]
    assert (policy.blocks.num_used == 0) == bool(reason)


def test_blocks_of_a_request_that_ends_in_flight_are_kept_until_the_step_is_over() -> None:
    policy, one, other = scheduler(), request(4), request(4)
    policy.add(one)
    policy.add(other)
    step = policy.schedule()
    assert step
    assert policy.finish(one, "abort")
    assert not policy.finish(one, "stop")
    policy.check()
    assert policy.blocks.num_used == 2
    assert policy.update(step, [5, 6]) == []
    assert (one.output_ids, other.output_ids) == ([], [6])
    assert one.finish_reason == "abort"
    assert policy.blocks.num_used == 1
    policy.check()


def test_a_waiting_request_can_be_aborted() -> None:
    policy, one = scheduler(), request(4)
    policy.add(one)
    assert policy.finish(one, "abort")
    assert policy.schedule() is None


def test_a_step_that_fails_takes_only_its_own_requests_along() -> None:
    policy, one, late = scheduler(seats=1), request(4), request(4)
    policy.add(one)
    policy.add(late)
    step = policy.schedule()
    assert step
    assert policy.fail(step) == [one]
    assert one.finish_reason == "error"
    assert [row.request for row in run(policy).rows] == [late]


def test_prompt_log_probabilities_are_bounded_in_a_step_and_asked_for_once() -> None:
    policy, one, other = scheduler(num_blocks=300, budget=1000), request(300, params=SCORED), request(4, params=SCORED)
    policy.add(one)
    policy.add(other)
    step = run(policy)
    assert [row.prompt_logits for row in step.rows] == [range(256)]  # the other one finds no room for its first
    policy.requeue()
    step = run(policy)
    assert [row.prompt_logits for row in step.rows] == [range(256, 299), range(3)]
    assert [row.num_new_tokens for row in step.rows] == [300, 4]


@dataclass(frozen=True)
class Arrival:
    """A request of the simulation below."""

    step: int
    length: int
    max_new_tokens: int
    scored: bool
    aborted_after: int | None  # steps after its arrival


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 20),
    length=st.integers(1, 30),
    max_new_tokens=st.integers(1, 20),
    scored=st.booleans(),
    aborted_after=st.none() | st.integers(0, 15),
)


@dataclass
class Simulation:
    """Drives scheduler, plans and a checking device, step by step."""

    policy: Scheduler
    device: PlanReader
    requests: dict[int, Request] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    reasons: dict[int, FinishReason] = field(default_factory=dict)

    def arrive(self, number: int, arrival: Arrival) -> None:
        params = GenerationParams(sampling=ENDS.sampling, prompt_logprobs=arrival.scored)
        one = request(arrival.length, arrival.max_new_tokens, params, str(number))
        self.requests[number] = one
        self.policy.add(one)

    def end(self, number: int) -> None:
        if self.policy.finish(self.requests[number], "abort"):
            self.reasons[number] = "abort"

    def step(self, limits: tuple[int, int], aborted: list[int], accident: str) -> None:
        """One step; ``aborted`` end while it is in flight, ``accident`` may befall it."""
        step = self.policy.schedule()
        self.policy.check()
        if step is None:
            assert not self.policy.unfinished
            return
        seats, budget = limits
        assert len(step.rows) <= seats
        assert sum(row.num_new_tokens for row in step.rows) <= budget
        assert sum(len(row.prompt_logits) for row in step.rows) <= MAX_PROMPT_LOGITS
        assert all(row.start == row.request.num_computed_tokens for row in step.rows)
        self.admitted += [int(one.request_id) for one in step.admitted if not one.num_preemptions]
        tokens = self.device.run(make_plan(step, BLOCK_SIZE))
        for number in aborted:
            self.end(number)
        if accident == "lost":
            self.policy.requeue()
            return
        ended = self.policy.fail(step) if accident == "failed" else self.policy.update(step, tokens)
        for one in ended:
            number = int(one.request_id)
            assert number not in self.reasons
            assert one.finish_reason
            self.reasons[number] = one.finish_reason


@settings(max_examples=150, deadline=None)
@given(
    plan=st.lists(arrivals, min_size=1, max_size=12),
    num_blocks=st.integers(14, 40),
    seats=st.integers(1, 6),
    budget=st.integers(1, 24),
    accidents=st.dictionaries(st.integers(0, 40), st.sampled_from(["lost", "failed"]), max_size=3),
)
def test_any_load_ends_with_every_answer_right_and_every_block_free(
    plan: list[Arrival], num_blocks: int, seats: int, budget: int, accidents: dict[int, str]
) -> None:
    """Random arrivals, lengths, aborts, lost caches and failed steps, in a cache that forces preemptions."""
    sim = Simulation(scheduler(num_blocks, seats, budget), PlanReader(num_blocks, BLOCK_SIZE))
    plan = sorted(plan, key=lambda arrival: arrival.step)
    ends = {
        i: arrival.step + arrival.aborted_after for i, arrival in enumerate(plan) if arrival.aborted_after is not None
    }
    # Each step computes a token at least, and only blocks that ran out or a lost cache make it compute one again.
    for now in range(5000):
        for number, arrival in enumerate(plan):
            if arrival.step == now:
                sim.arrive(number, arrival)
        sim.step((seats, budget), [number for number, end in ends.items() if end == now], accidents.get(now, ""))
        sim.policy.check()
        if now > 40 and not sim.policy.unfinished:
            break
    assert sorted(sim.reasons) == list(range(len(plan))), "a request has no finish reason"
    assert sim.policy.blocks.num_used == 0
    assert sim.admitted == sorted(sim.admitted), "somebody was overtaken"
    for number, one in sim.requests.items():
        whole = solo(one.prompt_ids, one.max_new_tokens)
        assert one.output_ids == whole[: len(one.output_ids)]
        if sim.reasons[number] in ("stop", "length"):
            assert one.output_ids == whole
            assert sim.reasons[number] == ("stop" if whole[-1] == END else "length")
            assert one.num_prompt_logprobs == (len(one.prompt_ids) - 1 if one.params.prompt_logprobs else 0)
