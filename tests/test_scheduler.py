"""The policy: who takes part in a step, and that nothing is lost on the way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_reader import END, VOCAB_SIZE, PlanReader, solo

from agent.protocol import SamplingParams, StepPlan
from server.block_manager import BlockManager
from server.dispatcher import Load
from server.request import FinishReason, GenerationParams, Request, Status
from server.scheduler import MAX_IN_FLIGHT, MAX_PREEMPTIONS, Scheduler
from server.step import MAX_PROMPT_LOGITS, Step
from server.step_plan import make_plan
from server.trials import CRASHES_TO_SUSPECT

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
    policy = scheduler(num_blocks=1 + 6)
    running, large, small = request(9), request(9), request(1)
    for one in (running, large, small):
        policy.add(one)
    assert [row.request for row in run(policy).rows] == [running]
    policy.finish(running, "abort")
    assert [row.request for row in run(policy).rows] == [large, small]


@pytest.mark.parametrize(("num_blocks", "admitted"), [(7, True), (6, False)])
def test_an_admission_leaves_two_blocks_for_each_running_row(num_blocks: int, admitted: bool) -> None:
    policy = scheduler(num_blocks=1 + num_blocks)
    first, second = request(5), request(12)
    policy.add(first)
    run(policy)  # two blocks
    policy.add(second)  # its three are free
    assert (second in [row.request for row in run(policy).rows]) == admitted


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
    assert shares(again) == [(second, 4, True)], "its first block was still known"
    assert second.num_cached_tokens == 0


def test_preempted_requests_queue_in_the_order_of_arrival() -> None:
    policy = scheduler()
    requests = [request(4) for _ in range(4)]
    for one in requests[:3]:
        policy.add(one)
    run(policy)
    policy.add(requests[3])
    assert policy.requeue(crashed=False) == []
    assert policy.unfinished == requests
    policy.check()
    assert policy.blocks.num_used == 0
    assert run(policy).admitted == tuple(requests)
    assert requests[0].output_ids == [1, 1]


def test_a_priority_is_worth_ten_seconds_a_step() -> None:
    policy = scheduler(seats=1)
    late = [(0, 0.0), (1, 0.0), (0, 9.0), (-1, 9.0), (0, 11.0)]
    requests = [
        Request(
            request_id=str(i),
            prompt_ids=[1],
            params=GenerationParams(priority=priority),
            arrival=arrival,
            max_new_tokens=1,
        )
        for i, (priority, arrival) in enumerate(late)
    ]
    for one in requests:
        policy.add(one)
    assert [run(policy).rows[0].request.request_id for _ in requests] == ["3", "0", "2", "1", "4"]


def test_who_was_preempted_often_comes_back_with_room_for_its_whole_answer() -> None:
    policy = scheduler(num_blocks=1 + 6)
    first, second = request(4, max_new_tokens=12), request(4, max_new_tokens=12)
    second.num_preemptions = MAX_PREEMPTIONS
    policy.add(first)
    policy.add(second)
    assert [row.request for row in run(policy).rows] == [first]  # four blocks are needed, and two to spare
    policy.finish(first, "abort")
    assert [row.request for row in run(policy).rows] == [second]
    assert len(second.block_table) == 4
    policy.check()


def test_who_crashed_agents_of_another_group_runs_alone_in_this_one() -> None:
    policy, innocent, suspect = scheduler(), request(3), request(3)
    suspect.num_crashes = CRASHES_TO_SUSPECT
    policy.add(innocent)
    policy.add(suspect)
    assert [row.request for row in run(policy).rows] == [suspect]
    assert {row.request for row in run(policy).rows} == {innocent, suspect}


def test_the_next_step_is_planned_before_the_token_of_the_last_is_known() -> None:
    policy, one, other = scheduler(), request(4, max_new_tokens=3), request(4, max_new_tokens=1)
    policy.add(one)
    policy.add(other)
    first = policy.schedule()
    second = policy.schedule()
    assert first
    assert shares(second) == [(one, 1, True)], "the other one has its last token"
    assert second
    assert (second.rows[0].start, one.num_pending_tokens, one.output_ids) == (4, 2, [])
    assert policy.schedule() is None, "two are in flight"
    policy.update(first, [1, 1])
    assert (one.output_ids, other.finish_reason) == ([1], "length")
    third = policy.schedule()
    assert third
    assert shares(third) == [(one, 1, True)]
    assert policy.update(second, [END]) == [one]
    assert policy.blocks.num_used == 0, "what the third step writes, it writes before the fourth"
    assert policy.update(third, [5]) == []
    assert one.output_ids == [1, END]
    policy.check()


def test_a_preempted_request_is_not_admitted_before_its_step_is_over() -> None:
    policy = scheduler(num_blocks=1 + 5)
    first, second = request(8), request(4)
    policy.add(first)
    policy.add(second)
    for _ in range(4):
        run(policy)
    step = policy.schedule()
    following = policy.schedule()  # a fourth block for the first request, and none is left for the second
    assert step
    assert following
    assert shares(following) == [(first, 1, True)]
    assert second.status is Status.WAITING
    policy.update(step, [1, 2])
    assert second.output_ids == [1, 1, 1, 1, 2]
    policy.finish(first, "abort")
    assert shares(policy.schedule()) == [(second, 5, True)]  # its first block is known


def common(length: int, name: str = "", **params: Any) -> Request:
    """A request whose tokens are those of all others up to its length."""
    prompt = list(range(length))
    params = {"sampling": ENDS.sampling, **params}
    return Request(request_id=name, prompt_ids=prompt, params=GenerationParams(**params), arrival=0.0, max_new_tokens=8)


def test_a_prefix_is_computed_once() -> None:
    policy, one, two = scheduler(), common(22), common(30)
    policy.add(one)
    run(policy)
    policy.add(two)
    assert shares(run(policy)) == [(one, 1, True), (two, 30 - 20, True)]
    assert two.num_cached_tokens == 20
    assert two.block_table[:5] == one.block_table[:5]
    policy.check()
    policy.finish(one, "abort")
    policy.finish(two, "abort")
    policy.add(again := common(30))
    assert shares(run(policy)) == [(again, 30 - 28, True)]
    policy.add(same := common(28))
    assert shares(run(policy)) == [(again, 1, True), (same, 28 - 24, True)], "one token is left to sample from"
    assert policy.blocks.num_used == 7 + 1 + 1


@pytest.mark.parametrize("params", [{"prompt_logprobs": True}, {"cache_salt": "mine"}])
def test_who_goes_without_the_others_prefix(params: dict[str, Any]) -> None:
    policy, one, two = scheduler(), common(20), common(20, **params)
    policy.add(one)
    run(policy)
    policy.finish(one, "abort")
    policy.add(two)
    assert shares(run(policy)) == [(two, 20, True)]
    assert two.num_cached_tokens == 0


def test_a_salt_shares_with_itself() -> None:
    policy, one, two = scheduler(), common(20, cache_salt="ours"), common(20, cache_salt="ours")
    policy.add(one)
    run(policy)
    policy.add(two)
    assert shares(run(policy)) == [(one, 1, True), (two, 4, True)]


def test_a_lost_cache_is_not_known_any_more() -> None:
    policy, one = scheduler(), common(20)
    policy.add(one)
    run(policy)
    policy.requeue(crashed=False)
    assert shares(run(policy)) == [(one, 21, True)]


def siblings(count: int, length: int = 22) -> list[Request]:
    first, *others = [common(length, str(i)) for i in range(count)]
    for one in others:
        one.leader = first
    return [first, *others]


def test_answers_to_one_prompt_share_its_blocks_and_copy_the_last() -> None:
    policy, requests = scheduler(), siblings(3)
    for one in requests:
        policy.add(one)
    first = policy.schedule()
    assert shares(first) == [(requests[0], 22, True)]
    second = policy.schedule()  # the prompt is in flight, which is enough
    assert shares(second) == [(requests[0], 1, True), (requests[1], 1, True), (requests[2], 1, True)]
    assert first
    assert second
    assert second.block_copies == tuple((requests[0].block_table[5], one.block_table[5]) for one in requests[1:])
    assert len({one.block_table[5] for one in requests}) == 3
    assert all(one.block_table[:5] == requests[0].block_table[:5] for one in requests)
    policy.check()
    policy.update(first, [1])
    policy.update(second, [1, 2, 3])
    assert [one.output_ids for one in requests] == [[1, 1], [2], [3]]


def test_graphs_without_mixed_steps_take_turns() -> None:
    policy = Scheduler(BlockManager(100, BLOCK_SIZE), max_num_seqs=8, max_num_batched_tokens=8, mixed=False)
    short, long = request(5), request(20)
    policy.add(short)
    assert shares(run(policy)) == [(short, 5, True)]
    policy.add(long)
    assert [shares(run(policy)) for _ in range(5)] == [
        [(short, 1, True)],
        [(long, 8, False)],
        [(short, 1, True)],
        [(long, 8, False)],
        [(short, 1, True)],
    ]
    assert shares(run(policy)) == [(long, 4, True)]
    assert shares(run(policy)) == [(short, 1, True), (long, 1, True)]


def test_graphs_without_chunks_get_whole_prompts() -> None:
    policy = Scheduler(BlockManager(100, BLOCK_SIZE), max_num_seqs=8, max_num_batched_tokens=30, chunks=False)
    first, second = common(20), common(20)
    policy.add(first)
    policy.add(second)
    assert shares(run(policy)) == [(first, 20, True)]
    assert shares(run(policy)) == [(first, 1, True), (second, 20, True)], "and take no prefix over"


def crash(policy: Scheduler) -> list[Request]:
    while policy.schedule():
        pass
    return policy.requeue(crashed=True)


def test_who_is_in_flight_at_three_crashes_is_alone_at_the_third() -> None:
    policy, requests = scheduler(), [request(4, name=str(i)) for i in range(3)]
    for one in requests:
        policy.add(one)
    assert crash(policy) == []
    assert crash(policy) == []
    assert [row.request for row in run(policy).rows] == [requests[0]], "it runs alone, and is cleared"
    step = policy.schedule()
    assert step
    assert [row.request for row in step.rows] == [requests[1]]
    assert policy.schedule() is None, "nothing else is in flight"
    assert policy.requeue(crashed=True) == [requests[1]]
    assert requests[1].finish_reason == "error"
    assert [row.request for row in run(policy).rows] == [requests[2]]
    assert [row.request for row in run(policy).rows] == [requests[2], requests[0]]
    policy.check()


def test_a_token_between_two_crashes_proves_innocence() -> None:
    policy, one = scheduler(), request(4)
    policy.add(one)
    for _ in range(5):
        run(policy)
        assert crash(policy) == []
    assert one.num_crashes == 1


def test_the_culprit_of_a_failed_step_is_found_in_halves() -> None:
    policy, requests = scheduler(seats=8), [request(4, max_new_tokens=20, name=str(i)) for i in range(8)]
    for one in requests:
        policy.add(one)
    run(policy)
    groups: list[str] = []
    ended: list[Request] = []
    while not ended:
        step = policy.schedule()
        assert step
        members = [row.request for row in step.rows]
        groups.append("".join(one.request_id for one in members))
        if requests[5] in members:
            policy.schedule()  # planned on top of what fails
            ended = policy.fail(step)
        else:
            policy.update(step, [1] * len(members))
        policy.check()
    assert ended == [requests[5]]
    assert groups == ["01234567", "0123", "4567", "45", "4", "5"]
    assert "".join(row.request.request_id for row in run(policy).rows) == "67"
    assert "".join(row.request.request_id for row in run(policy).rows) == "0123467"


def test_a_suspect_gets_room_from_those_who_are_not() -> None:
    policy = scheduler(num_blocks=1 + 6)
    large, small = request(13, name="large"), request(8, name="small")
    policy.add(large)
    policy.add(small)
    step = policy.schedule()
    assert step
    assert [row.request for row in step.rows] == [large]
    policy.update(step, [1])
    policy.finish(large, "abort")
    step = policy.schedule()
    assert step
    assert policy.fail(step) == [small]


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


def test_what_a_request_gives_up_in_flight_is_free_at_once() -> None:
    policy, one, other = scheduler(), request(4), request(4)
    policy.add(one)
    policy.add(other)
    step = policy.schedule()
    assert step
    assert policy.finish(one, "abort")
    assert not policy.finish(one, "stop")
    policy.check()
    assert policy.blocks.num_used == 1
    assert policy.update(step, [5, 6]) == []
    assert (one.output_ids, other.output_ids) == ([], [6])
    assert one.finish_reason == "abort"
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
    policy.requeue(crashed=False)
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
    shares: bool  # its tokens are those of the others that share
    answers: int
    priority: int
    guilty: bool  # no step with it can be run
    aborted_after: int | None  # steps after its arrival


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 20),
    length=st.integers(1, 30),
    max_new_tokens=st.integers(1, 20),
    scored=st.booleans(),
    shares=st.booleans(),
    answers=st.integers(1, 3),
    priority=st.integers(-2, 2),
    guilty=st.sampled_from([False] * 7 + [True]),
    aborted_after=st.none() | st.integers(0, 15),
)


@dataclass
class Simulation:
    """Drives scheduler, plans and a checking device, with one step or two in flight."""

    policy: Scheduler
    device: PlanReader
    requests: dict[str, Request] = field(default_factory=dict)
    guilty: set[Request] = field(default_factory=set)
    in_flight: deque[tuple[Step, StepPlan]] = field(default_factory=deque)
    admitted: list[Request] = field(default_factory=list)
    reasons: dict[str, FinishReason] = field(default_factory=dict)

    def arrive(self, number: int, arrival: Arrival) -> None:
        params = GenerationParams(sampling=ENDS.sampling, prompt_logprobs=arrival.scored, priority=arrival.priority)
        leader = None
        for index in range(arrival.answers):
            one = request(arrival.length, arrival.max_new_tokens, params, f"{number}-{index}")
            if arrival.shares:
                one.prompt_ids = [i % VOCAB_SIZE for i in range(arrival.length)]
            one.leader = leader
            leader = leader or one
            self.requests[one.request_id] = one
            if arrival.guilty:
                self.guilty.add(one)
            self.policy.add(one)

    def abort(self, number: int) -> None:
        for name, one in self.requests.items():
            if name.startswith(f"{number}-") and self.policy.finish(one, "abort"):
                self.reasons[name] = "abort"

    def plan(self, limits: tuple[int, int]) -> bool:
        """Plan a step and see that it keeps to its limits; False if there is none."""
        step = self.policy.schedule()
        self.policy.check()
        if step is None:
            return False
        seats, budget = limits
        assert len(step.rows) <= seats
        assert step.num_tokens <= budget
        assert sum(len(row.prompt_logits) for row in step.rows) <= MAX_PROMPT_LOGITS
        self.admitted += [one for one in step.admitted if one.num_admissions == 1]
        self.in_flight.append((step, make_plan(step, BLOCK_SIZE)))
        return True

    def finish(self, accident: str) -> None:
        """The oldest step is over, in one way or another."""
        if not self.in_flight:
            return
        step, plan = self.in_flight.popleft()
        if accident:
            self.in_flight.clear()
            self.end(self.policy.requeue(crashed=accident == "crash"))
        elif any(row.request in self.guilty for row in step.rows):
            self.in_flight.clear()
            self.end(self.policy.fail(step))
        else:
            self.end(self.policy.update(step, self.device.run(plan)))
        self.policy.check()

    def end(self, requests: list[Request]) -> None:
        for one in requests:
            assert one.request_id not in self.reasons
            assert one.finish_reason
            self.reasons[one.request_id] = one.finish_reason


@settings(max_examples=250, deadline=None)
@given(
    plan=st.lists(arrivals, min_size=1, max_size=10),
    num_blocks=st.integers(14, 40),
    seats=st.integers(1, 6),
    budget=st.integers(1, 24),
    depths=st.lists(st.integers(1, MAX_IN_FLIGHT), min_size=1, max_size=10),
    accidents=st.dictionaries(st.integers(0, 40), st.sampled_from(["crash", "taken"]), max_size=3),
    mixed=st.booleans(),
)
def test_any_load_ends_with_every_answer_right_and_every_block_free(
    plan: list[Arrival],
    num_blocks: int,
    seats: int,
    budget: int,
    depths: list[int],
    accidents: dict[int, str],
    mixed: bool,
) -> None:
    """Random arrivals, lengths, priorities, aborts, culprits and lost caches, in a cache that forces preemptions."""
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    policy = Scheduler(blocks, max_num_seqs=seats, max_num_batched_tokens=budget, mixed=mixed)
    sim = Simulation(policy, PlanReader(num_blocks, BLOCK_SIZE))
    plan = sorted(plan, key=lambda arrival: arrival.step)
    ends = {
        i: arrival.step + arrival.aborted_after for i, arrival in enumerate(plan) if arrival.aborted_after is not None
    }
    for now in range(20_000):
        for number, arrival in enumerate(plan):
            if arrival.step == now:
                sim.arrive(number, arrival)
        while len(sim.in_flight) < depths[now % len(depths)] and sim.plan((seats, budget)):
            pass
        for number in (number for number, end in ends.items() if end == now):
            sim.abort(number)
        sim.finish(accidents.get(now, ""))
        if now > 40 and not sim.policy.unfinished and not sim.in_flight:
            break
    assert sorted(sim.reasons) == sorted(sim.requests), "a request has no finish reason"
    assert blocks.num_used == 0
    assert all(one.num_preemptions <= MAX_PREEMPTIONS for one in sim.requests.values())
    for name, one in sim.requests.items():
        whole = solo(one.prompt_ids, one.max_new_tokens)
        assert one.output_ids == whole[: len(one.output_ids)]
        if sim.reasons[name] in ("stop", "length"):
            assert one.output_ids == whole
            assert sim.reasons[name] == ("stop" if whole[-1] == END else "length")
            assert one.num_prompt_logprobs == (len(one.prompt_ids) - 1 if one.params.prompt_logprobs else 0)
        assert (sim.reasons[name] == "error") <= (one in sim.guilty or "crash" in accidents.values())
    if not (accidents or sim.guilty or any(arrival.priority for arrival in plan)):
        orders = [one.order for one in sim.admitted]
        assert orders == sorted(orders), "somebody was overtaken"


def test_requests_go_on_in_another_scheduler_where_they_stood() -> None:
    limits = 4, 16
    first, second = (
        Simulation(
            Scheduler(BlockManager(30, BLOCK_SIZE), max_num_seqs=limits[0], max_num_batched_tokens=limits[1]),
            PlanReader(30, BLOCK_SIZE),
        )
        for _ in range(2)
    )
    for number, answers in enumerate((3, 1)):  # a leader with two that share its blocks, and another one
        first.arrive(number, Arrival(0, 9, 8, False, False, answers, 0, False, None))
    for _ in range(4):
        assert first.plan(limits)
        first.finish("")
    assert any(one.output_ids for one in first.requests.values())
    assert first.plan(limits)
    first.finish("taken")
    for one in first.policy.unfinished:
        first.policy.remove(one)
        second.policy.add(one)
    first.policy.check_idle()
    while second.plan(limits):
        second.finish("")
    assert all(one.output_ids == solo(one.prompt_ids, one.max_new_tokens) for one in first.requests.values())
    second.policy.check_idle()


def test_the_load_counts_what_is_left_to_compute_and_what_is_known() -> None:
    policy = Scheduler(BlockManager(30, BLOCK_SIZE), max_num_seqs=1, max_num_batched_tokens=6)
    first, second, third = (request(3 * BLOCK_SIZE + 1, 2, name=name) for name in "abc")
    for one in (second, third):
        one.prompt_ids = first.prompt_ids
    assert policy.load(first) == Load(num_requests=0, num_tokens=0, num_known_tokens=0)
    policy.add(first)
    policy.add(second)
    tokens = len(first.prompt_ids)
    assert policy.load(third) == Load(num_requests=2, num_tokens=2 * tokens, num_known_tokens=0)
    step = policy.schedule()
    assert step
    assert policy.load(third) == Load(num_requests=2, num_tokens=2 * tokens - 6, num_known_tokens=0)
    policy.update(step, [])
    assert policy.load(third).num_known_tokens == 6 // BLOCK_SIZE * BLOCK_SIZE
