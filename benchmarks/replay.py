"""Replays requests against the server's own scheduler, with a clock that jumps from one event to the next.

What ``server/step_loop.py`` does, in its order: plan as many steps as may be in flight, wait for the oldest, take its
tokens, plan again. The agents run steps one after another, each as soon as they have its plan and are done with the one
before. A request that arrives in between is seen at the next planning. HTTP, tokenizing and text cost no time here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from agent.protocol import SamplingParams
from benchmarks.device import Device
from benchmarks.latency import Answer
from benchmarks.trace import Job, Shape
from server.block_manager import BlockManager
from server.request import GenerationParams, Request
from server.scheduler import SPARE_BLOCKS, Scheduler
from server.step import Step

END, TOKEN = 0, 1  # what ends an answer, and what it is made of


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
    busy: float = 0.0  # of the device
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
        self._limits = limits
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
        self._number = 0

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_waiting + self._scheduler.num_running

    def add(self, outcome: Outcome) -> bool:
        """Queue a request; False if a server would refuse it as too long."""
        shape, limit = outcome.job.shape, self._limits.max_new_tokens
        new_tokens = shape.output_tokens if limit is None else limit
        if shape.prompt_tokens + new_tokens > self._longest:
            return False
        self._number += 1
        request = Request(
            request_id=str(self._number),
            prompt_ids=_prompt(shape, self._number),
            params=GenerationParams(sampling=SamplingParams(end_token_ids=(END,)), priority=shape.priority),
            arrival=outcome.job.arrival,
            max_new_tokens=new_tokens,
        )
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


def replay(jobs: Sequence[Job], device: Device, limits: Limits) -> tuple[list[Outcome], Totals]:
    """Run all ``jobs``, which are in order of arrival, to their ends."""
    policy = Policy(device, limits)
    outcomes = [Outcome(job) for job in jobs]
    coming = deque(outcomes)
    sent: deque[_Sent] = deque()
    now = free_at = jobs[0].arrival  # the server's time, and when the agents have run all that was sent
    totals = Totals(begin=now, blocks=policy.blocks.num_usable)

    def wait(until: float) -> None:
        nonlocal now
        if until > now:
            totals.request_seconds += policy.num_unfinished * (until - now)
            totals.block_seconds += policy.blocks.num_used * (until - now)
            now = until

    while coming or sent or policy.num_unfinished:
        while coming and coming[0].job.arrival <= now:
            totals.refused += not policy.add(coming.popleft())
        while step := policy.plan(now + 1e-3 * device.server_ms):
            wait(now + 1e-3 * device.server_ms)
            seconds = device.step_seconds(step)
            free_at = max(now, free_at) + seconds + 1e-3 * device.agent_ms
            sent.append(_Sent(step, free_at))
            totals.busy += seconds
            totals.steps += 1
            totals.rows += len(step.rows)
            totals.computed_tokens += step.num_tokens
        if sent:
            wait(sent[0].end)
            totals.wasted_rows += policy.finish(sent.popleft().step, now)
        elif coming:
            wait(coming[0].job.arrival)
        else:
            assert not policy.num_unfinished, "requests wait, and nothing is scheduled"
    totals.end = now
    policy.check()
    return [outcome for outcome in outcomes if outcome.arrivals], totals


def _prompt(shape: Shape, number: int) -> list[int]:
    """Tokens that only requests with the same prefix have in common, and these only as far as it goes."""
    prefix = [crc32((shape.prefix or "").encode()) >> 1] * shape.prefix_tokens
    return prefix + [-number] * (shape.prompt_tokens - len(prefix))
