"""The loop that keeps one model's agents busy: schedule, send, pass on the last step's tokens, take the answer over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from agent.protocol import Hello
from config.serving_config import LimitsConfig
from server.agent_group import AgentGroup, AgentsLost, AgentsRefused, AgentsTaken, StepFailed, alike
from server.answer import Answer
from server.block_manager import BlockManager
from server.errors import GenerationFailed
from server.metrics import ModelMetrics
from server.request import FinishReason, Request
from server.scheduler import Scheduler, Step
from server.step_plan import make_plan, make_probe
from server.step_result import StepResult

PROBE_SECONDS = 2.0  # idle agents are asked for a sign of life this often
READY_SECONDS = 30.0  # without a sign for this long, they are not ready; a step of a large model takes seconds
REFUSED_SECONDS = 5.0  # between two looks at agents that came back and cannot serve this model
TAKEN_SECONDS = 30.0  # before agents are taken back from another server, or the two would take turns at every step

_log = logging.getLogger(__name__)


class StepLoop:
    """Runs the requests of one model. All methods but ``run`` and ``drained`` return at once, on one event loop."""

    def __init__(self, agents: AgentGroup, hello: Hello, limits: LimitsConfig, metrics: ModelMetrics) -> None:
        self.batch_size = 0  # rows of the step in flight
        self._agents = agents
        self._hello = hello
        self._limits = limits
        self._metrics = metrics
        self._scheduler = self._new_scheduler()
        self._answers: dict[Request, Answer] = {}
        self._undelivered: StepResult | None = None
        self._work = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._last_answer = time.monotonic()
        self._broken = False

    @property
    def ready(self) -> bool:
        """Whether every agent is connected and has answered lately."""
        return self._agents.connected and not self.given_up

    @property
    def given_up(self) -> bool:
        """Whether new requests are better refused: the agents are away for longer than a restart, or ``run`` failed."""
        return self._broken or time.monotonic() - self._last_answer >= READY_SECONDS

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def cache_usage(self) -> float:
        """Share of the blocks that requests own, 0 to 1."""
        return self._scheduler.blocks.num_used / self._scheduler.blocks.num_usable

    def add(self, answer: Answer) -> None:
        """Queue the request of ``answer``."""
        self._answers[answer.request] = answer
        self._empty.clear()
        self._scheduler.add(answer.request)
        self._metrics.prompt_tokens.inc(len(answer.request.prompt_ids))
        self._work.set()

    def abort(self, request: Request) -> None:
        """End a request, if it has not ended already."""
        if answer := self._answers.get(request):
            self._end(answer, "abort")
            answer.abort()

    def abort_all(self) -> None:
        """End all requests."""
        for request in list(self._answers):
            self.abort(request)

    async def drained(self, seconds: float) -> bool:
        """Wait until no request is left, for ``seconds`` at most; whether that was enough."""
        if self._answers:
            await _happens(self._empty, seconds)
        return not self._answers

    async def run(self) -> None:
        """Run steps for ever; cancel to stop."""
        try:
            await self._run_steps()
        except Exception:
            _log.exception("no more steps are run; restart the app")
            self._broken = True
            self._fail_all()
            await self._agents.close()

    async def _run_steps(self) -> None:
        while True:
            step: Step | None = None
            try:
                if not self._agents.connected:
                    await self._reconnect()
                step = self._scheduler.schedule()
                await (self._run_step(step) if step else self._idle())
            except AgentsTaken as error:
                self.batch_size = 0
                _log.error("%s; %d requests wait, next attempt in %g s", error, len(self._answers), TAKEN_SECONDS)
                await asyncio.sleep(TAKEN_SECONDS)
            except AgentsLost as error:
                _log.warning("agents lost: %s; %d requests wait for them", error, len(self._answers))
            except StepFailed as error:
                _log.error("%s", error)
                self._fail(step)
            except Exception:
                # The connection may be between two messages, so a new one is made.
                _log.exception("step %s raised", step.step_id if step else "planning")
                self._fail(step)
                await self._agents.close()

    async def _run_step(self, step: Step) -> None:
        """One step; what the step before brought goes to the clients while the agents work."""
        started = time.monotonic()
        plan = make_plan(step, self._hello.block_size)
        self._agents.send(plan)
        self._metrics.plan.observe(time.monotonic() - started)
        self._metrics.rows.observe(len(step.rows))
        self._metrics.preemptions.inc(step.num_preempted)
        for request in step.admitted:
            if not request.num_preemptions:
                self._metrics.queue_time.observe(started - request.arrival)
        self.batch_size = len(step.rows)
        self._deliver()
        output = await self._agents.receive(plan)
        self._last_answer = time.monotonic()
        self._metrics.agent.observe(output.step_seconds)
        self._metrics.device.observe(output.device_seconds)
        result = StepResult(step, output)
        self._scheduler.update(step, result.token_ids)
        self._undelivered = result
        self.batch_size = 0

    async def _idle(self) -> None:
        """Nothing is scheduled: pass on the last tokens and wait for work, with an eye on the agents."""
        self._deliver()
        self._scheduler.check()
        self._work.clear()
        if not await _happens(self._work, PROBE_SECONDS):
            await self._probe()

    async def _probe(self) -> None:
        """Ask the agents for a sign of life."""
        probe = make_probe()
        self._agents.send(probe)
        try:
            await self._agents.receive(probe)
        except StepFailed as error:
            _log.error("a probe fails: %s", error)
        else:
            self._last_answer = time.monotonic()

    def _deliver(self) -> None:
        """Pass on what the step before brought. A request that ended meanwhile has no answer any more."""
        result, now = self._undelivered, time.monotonic()
        if result is None:
            return
        for request, prompt_tokens in result.prompt_tokens():
            if answer := self._answers.get(request):
                answer.add_prompt_tokens([answer.token(*scored) for scored in prompt_tokens])
        for request in result.failed():
            if answer := self._answers.get(request):
                self._end(answer, "error")
                answer.fail(GenerationFailed("what the answer must be has become too complex to go on"))
        for request, scored in result.tokens():
            if answer := self._answers.get(request):
                reason = answer.add_token(answer.token(*scored), request.finish_reason)
                self._count_token(answer, now)
                if reason:
                    self._end(answer, reason)
        self._undelivered = None
        self._metrics.post.observe(time.monotonic() - now)

    def _count_token(self, answer: Answer, now: float) -> None:
        self._metrics.generation_tokens.inc()
        if answer.last_token_at is None:
            self._metrics.first_token.observe(now - answer.request.arrival)
        else:
            self._metrics.inter_token.observe(now - answer.last_token_at)
        answer.last_token_at = now

    def _end(self, answer: Answer, reason: FinishReason) -> None:
        """End a request, for whatever reason."""
        self._scheduler.finish(answer.request, reason)
        self._forget(answer, reason)

    def _forget(self, answer: Answer, reason: FinishReason) -> None:
        request = answer.request
        del self._answers[request]
        self._metrics.finished[reason].inc()
        self._metrics.whole_request.observe(time.monotonic() - request.arrival)
        tokens = f"{len(request.prompt_ids)} + {len(request.output_ids)} tokens"
        _log.info("request %s: %s, %s", request.request_id, reason, tokens)
        if not self._answers:
            self._empty.set()

    def _fail(self, step: Step | None) -> None:
        """End the requests of a step that went wrong; without a step, the scheduler itself did, and all of them end."""
        if step is None:
            self._scheduler = self._new_scheduler()
            self._fail_all()
        else:
            late = self._undelivered.requests if self._undelivered else ()
            self._scheduler.fail(step)
            self._fail_answers([*(row.request for row in step.rows), *late])
        self._undelivered = None
        self.batch_size = 0

    def _fail_answers(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if answer := self._answers.get(request):
                self._end(answer, "error")
                answer.fail(_failure(request))

    def _fail_all(self) -> None:
        """End all requests without their scheduler, which cannot be trusted any more."""
        for request, answer in list(self._answers.items()):
            self._forget(answer, "error")
            answer.fail(_failure(request))

    async def _reconnect(self) -> None:
        """Wait for the agents to come back; what was running is recomputed then, to the same tokens."""
        self._metrics.connections_lost.inc()
        self.batch_size = 0
        self._scheduler.requeue()
        while True:
            try:
                hello = await self._agents.connect()
                if alike(hello) != alike(self._hello) or hello.num_blocks != self._hello.num_blocks:
                    raise AgentsRefused("the agents came back with another model, cache or limits; restart the app")
            except AgentsRefused as refusal:
                _log.error("%s", refusal)
                await self._agents.close()
                self._fail_answers(list(self._answers))
                await asyncio.sleep(REFUSED_SECONDS)  # until someone mends it
            else:
                _log.info("the agents are back")
                self._last_answer = time.monotonic()
                return

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            BlockManager(self._hello.num_blocks, self._hello.block_size),
            max_num_seqs=min(self._hello.max_num_seqs, self._limits.max_num_seqs),
            max_num_batched_tokens=min(self._hello.max_num_batched_tokens, self._limits.max_num_batched_tokens),
        )


def _failure(request: Request) -> GenerationFailed:
    where = f"the server's log says why, under request {request.request_id}"
    return GenerationFailed(f"the answer could not be finished; {where}")


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for ``event``, for ``seconds`` at most; whether it is set.

    Before Python 3.12, ``asyncio.wait_for`` drops a cancellation that arrives together with the event.
    """
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((waiting,), timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()
