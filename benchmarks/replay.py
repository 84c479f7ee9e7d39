"""Replays requests against the server's own scheduler, with a clock that jumps from one event to the next.

What ``server/step_loop.py`` does, in its order: plan as many steps as may be in flight, wait for the oldest, take its
tokens, plan again. The agents run steps one after another, each as soon as they have its plan and are done with the one
before. A request that arrives in between is seen at the next planning. HTTP, tokenizing and text cost no time here, and
the loops of several groups do not hold up each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from operator import attrgetter
from typing import Literal, get_args
from zlib import crc32

from agent.protocol import SamplingParams
from benchmarks.device import Device
from benchmarks.latency import Answer
from benchmarks.trace import Job, Shape
from server.block_manager import BlockManager
from server.dispatcher import Load, choose
from server.request import GenerationParams, Request
from server.scheduler import SPARE_BLOCKS, Scheduler
from server.step import Step

END, TOKEN = 0, 1  # what ends an answer, and what it is made of

# Which group a request goes to: the server's own rule, the same blind to what is cached, or each in turn.
Dispatch = Literal["prefix_aware", "least_loaded", "round_robin"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a simulation may choose; the defaults are those of a deployment."""

    max_num_seqs: int
    max_num_batched_tokens: int
    chunks: bool = True  # prompts are cut; False: each goes into one step
    mixed: bool = True  # prompts and decoding rows share steps; False: the two take turns
    prefix_caching: bool = True
    spare_blocks: int = SPARE_BLOCKS  # that an admission leaves for each running row
    cached_tokens: int | None = None  # None: what the device has room for
    data_parallel: int = 1  # groups, each with a device
    dispatch: Dispatch = "prefix_aware"
    max_new_tokens: int | None = None  # that each request asks for; None: just the tokens that its answer has


@dataclass
class Outcome:
    """What became of one request; times in seconds."""

    job: Job
    admitted: float = 0.0  # when its first step was sent
    arrivals: list[float] = field(default_factory=list)  # of its tokens, at the server
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def answer(self) -> Answer:
        """In the terms of the load client."""
        return Answer(len(self.arrivals), self.job.arrival, tuple(self.arrivals))

    @property
    def queued(self) -> float:
        """From the arrival to the first step."""
        return self.admitted - self.job.arrival


@dataclass
class Totals:
    """What a replay adds up; times in seconds."""

    begin: float = 0.0
    end: float = 0.0
    devices: int = 1
    busy: float = 0.0  # of all devices together
    steps: int = 0
    rows: int = 0
    wasted_rows: int = 0  # of requests that turned out to have ended
    computed_tokens: int = 0
    request_seconds: float = 0.0  # requests in queue or at work, times how long
    block_seconds: float = 0.0  # owned blocks, times how long
    blocks: int = 0  # that there are
    refused: int = 0  # too long for context, cache or step

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Policy:
    """The scheduler as it is fed here: requests come from shapes, and tokens from their lengths."""

    def __init__(self, device: Device, limits: Limits) -> None:
        tokens = device.cached_tokens if limits.cached_tokens is None else limits.cached_tokens
        self.blocks = BlockManager(1 + tokens // device.block_size, device.block_size)
        longest = min(device.context_length, self.blocks.num_usable * device.block_size)
        self._longest = longest if limits.chunks else min(longest, limits.max_num_batched_tokens)
        self._scheduler = Scheduler(
            self.blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            prefix_caching=limits.prefix_caching,
            chunks=limits.chunks,
            mixed=limits.mixed,
            spare_blocks=limits.spare_blocks,
        )
        self._outcomes: dict[Request, Outcome] = {}

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_waiting + self._scheduler.num_running

    def load(self, request: Request) -> Load:
        """What the server's dispatcher is told."""
        return self._scheduler.load(request)

    def add(self, request: Request, outcome: Outcome) -> bool:
        """Queue a request; False if a server would refuse it as too long."""
        if len(request.prompt_ids) + request.max_new_tokens > self._longest:
            return False
        self._outcomes[request] = outcome
        self._scheduler.add(request)
        return True

    def plan(self, now: float) -> Step | None:
        """The next step, sent at ``now``."""
        step = self._scheduler.schedule()
        for request in step.admitted if step else ():
            if request.num_admissions == 1:
                self._outcomes[request].admitted = now
        return step

    def finish(self, step: Step, now: float) -> int:
        """The oldest step is over at ``now``; how many of its rows were for nothing."""
        sampled = [row.request for row in step.rows if row.samples]
        wanted = [request for request in sampled if request in self._outcomes]
        ended = self._scheduler.update(step, [self._token(request) for request in sampled])
        for request in wanted:
            self._outcomes[request].arrivals.append(now)
        for request in ended:
            outcome = self._outcomes.pop(request)
            outcome.num_cached_tokens, outcome.num_preemptions = request.num_cached_tokens, request.num_preemptions
        return len(sampled) - len(wanted)

    def check(self) -> None:
        """Assert that nothing is left over."""
        assert not self._outcomes, "a request got no answer"
        assert self.blocks.num_used == 0, "a block is leaked"
        self._scheduler.check()

    def _token(self, request: Request) -> int:
        outcome = self._outcomes.get(request)
        left = outcome.job.shape.output_tokens - len(outcome.arrivals) if outcome else 0
        return TOKEN if left > 1 else END


@dataclass(frozen=True)
class _Sent:
    step: Step
    end: float  # when its answer comes


class Group:
    """A device with its scheduler, and the server's time for it."""

    def __init__(self, device: Device, limits: Limits, totals: Totals) -> None:
        self.policy = Policy(device, limits)
        self._device = device
        self._totals = totals
        self._sent: deque[_Sent] = deque()
        self.now = self._free_at = totals.begin  # its own time, and when the agents have run all that was sent

    @property
    def due(self) -> float:
        """When the server looks at it next; infinite: when a request comes."""
        if self._sent:
            return max(self.now, self._sent[0].end)
        return self.now if self.policy.num_unfinished else inf

    def wait(self, until: float) -> None:
        """Let time go by."""
        if until > self.now:
            self._totals.request_seconds += self.policy.num_unfinished * (until - self.now)
            self._totals.block_seconds += self.policy.blocks.num_used * (until - self.now)
            self.now = until

    def take_turn(self) -> None:
        """Take the tokens of the oldest step, and send what may follow."""
        totals, device = self._totals, self._device
        if self._sent:
            self.wait(self._sent[0].end)
            totals.wasted_rows += self.policy.finish(self._sent.popleft().step, self.now)
        while step := self.policy.plan(self.now + 1e-3 * device.server_ms):
            self.wait(self.now + 1e-3 * device.server_ms)
            seconds = device.step_seconds(step)
            self._free_at = max(self.now, self._free_at) + seconds + 1e-3 * device.agent_ms
            self._sent.append(_Sent(step, self._free_at))
            totals.busy += seconds
            totals.steps += 1
            totals.rows += len(step.rows)
            totals.computed_tokens += step.num_tokens
        assert self._sent or not self.policy.num_unfinished, "requests wait, and nothing is scheduled"


def replay(jobs: Sequence[Job], device: Device, limits: Limits) -> tuple[list[Outcome], Totals]:
    """Run all ``jobs``, which are in order of arrival, to their ends."""
    totals = Totals(begin=jobs[0].arrival, devices=limits.data_parallel)
    groups = [Group(device, limits, totals) for _ in range(limits.data_parallel)]
    totals.blocks = sum(group.policy.blocks.num_usable for group in groups)
    outcomes = [Outcome(job) for job in jobs]
    coming = deque(enumerate(outcomes, 1))
    while True:
        next_one = min(groups, key=attrgetter("due"))
        if coming and coming[0][1].job.arrival <= next_one.due:
            number, outcome = coming.popleft()
            request = _request(outcome.job, number, limits)
            group = groups[_place(request, number, groups, limits.dispatch)]
            group.wait(outcome.job.arrival)
            totals.refused += not group.policy.add(request, outcome)
        elif next_one.due < inf:
            next_one.take_turn()
        else:
            break
    totals.end = max(group.now for group in groups)
    for group in groups:
        group.policy.check()
    return [outcome for outcome in outcomes if outcome.arrivals], totals


def _place(request: Request, number: int, groups: Sequence[Group], dispatch: Dispatch) -> int:
    """The place of the group that gets a request."""
    if dispatch == "round_robin":
        return number % len(groups)
    loads = [group.policy.load(request) for group in groups]
    if dispatch == "least_loaded":
        loads = [replace(load, num_known_tokens=0) for load in loads]
    return choose(loads)


def _request(job: Job, number: int, limits: Limits) -> Request:
    shape = job.shape
    return Request(
        request_id=str(number),
        prompt_ids=_prompt(shape, number),
        params=GenerationParams(sampling=SamplingParams(end_token_ids=(END,)), priority=shape.priority),
        arrival=job.arrival,
        max_new_tokens=shape.output_tokens if limits.max_new_tokens is None else limits.max_new_tokens,
    )


def _prompt(shape: Shape, number: int) -> list[int]:
    """Tokens that only requests with the same prefix have in common, and these only as far as it goes."""
    prefix = [crc32((shape.prefix or "").encode()) >> 1] * shape.prefix_tokens
    return prefix + [-number] * (shape.prompt_tokens - len(prefix))
