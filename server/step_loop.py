"""The loop that keeps one group of agents busy.

Two steps are in flight: while the agents run one, the next is planned and sent, so they never wait for this process. In
the meantime the tokens of the step before go to the clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from agent.protocol import Hello, StepPlan
from config.serving_config import LimitsConfig
from server.agent_group import AgentGroup, AgentsLost, AgentsRefused, AgentsTaken, StepFailed, alike
from server.answer import Answer
from server.block_manager import BlockManager
from server.dispatcher import Load
from server.errors import GenerationFailed, NoTurn
from server.events import happens
from server.metrics import GroupMetrics
from server.observer import Observer
from server.open_answers import OpenAnswers
from server.request import FinishReason, Request, Status
from server.scheduler import Scheduler
from server.step import Step
from server.step_plan import make_plan, make_probe
from server.step_result import StepResult

PROBE_SECONDS = 2.0  # idle agents are asked for a sign of life this often
READY_SECONDS = 30.0  # without a sign for this long, they are not ready; a step of a large model takes seconds
REFUSED_SECONDS = 5.0  # between two looks at agents that came back and cannot serve this model
TAKEN_SECONDS = 30.0  # before agents are taken back from another server, or the two would take turns at every step

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A step that the agents have, or are about to get."""

    step: Step
    plan: StepPlan


class StepLoop:
    """Runs the requests of one group. All methods but ``run`` and ``drained`` return at once, on one event loop."""

    def __init__(
        self,
        agents: AgentGroup,
        hello: Hello,
        limits: LimitsConfig,
        *,
        salt: bytes,
        metrics: GroupMetrics,
        observer: Observer,
        changed: Callable[[], None],
    ) -> None:
        """``metrics`` are of its steps, ``observer`` sees the model's requests, ``salt`` is all its schedulers'.

        ``changed`` is called when the agents are lost, when they are back, and when they are given up.
        """
        self._agents = agents
        self._hello = hello
        self._limits = limits
        self._salt = salt
        self._metrics = metrics
        self._observer = observer
        self._changed = changed
        self._scheduler = self._new_scheduler()
        self._answers = OpenAnswers()
        self._sent: deque[Sent] = deque()  # in flight, oldest first
        self._undelivered: StepResult | None = None
        self._work = asyncio.Event()
        self._last_answer = time.monotonic()
        self._broken = self._refused = False

    @property
    def batch_size(self) -> int:
        """Rows of the step that the agents run."""
        return len(self._sent[0].step.rows) if self._sent else 0

    @property
    def ready(self) -> bool:
        """Whether every agent is connected and has answered lately."""
        lately = time.monotonic() - self._last_answer < READY_SECONDS
        return self._agents.alive and lately and not self.given_up

    @property
    def given_up(self) -> bool:
        """Whether requests have nothing to wait for: ``run`` has failed, or the agents cannot or do not come back."""
        return self._broken or self._refused

    @property
    def empty(self) -> bool:
        """Whether no request is left."""
        return not self._answers

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together: what the model was made for, or what the cache holds."""
        hello = self._hello
        cache = (hello.num_blocks - 1) * hello.block_size
        if hello.capabilities.cached_context:
            return min(hello.context_length, cache)
        step = min(hello.max_num_batched_tokens, self._limits.max_num_batched_tokens)  # takes a prompt whole
        return min(hello.context_length, cache, step)

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

    def load(self, request: Request) -> Load:
        """How the group stands, as a new request sees it."""
        return self._scheduler.load(request)

    def fits(self, request: Request) -> bool:
        """Whether there is room for the request and its longest answer."""
        return len(request.prompt_ids) + request.max_new_tokens <= self.max_model_len

    def add(self, answer: Answer) -> None:
        """Queue the request of ``answer``, for as long as the limits allow."""
        self._scheduler.add(answer.request)
        limits = (self._limits.max_queue_seconds, self._tire), (self._limits.max_seconds, self._cut)
        loop, arrival = asyncio.get_running_loop(), answer.request.arrival
        timers = [loop.call_at(arrival + seconds, late, answer) for seconds, late in limits if seconds is not None]
        self._answers.add(answer, timers)
        self._work.set()

    def movable(self) -> list[Answer]:
        """What other groups may go on with while the agents are away, in the order in which it came here.

        A request that was in flight when they were lost may be the reason. It stays, lest it costs the others their
        agents as well, until these have been given up.
        """
        if self._agents.connected:
            return []
        return [
            answer
            for answer in self._answers
            if answer.request.status is Status.WAITING
            and not answer.request.num_in_flight
            and (self.given_up or not answer.request.num_crashes)
        ]

    def remove(self, answer: Answer) -> None:
        """Let another group go on with one of ``movable``."""
        self._scheduler.remove(answer.request)
        self._answers.drop(answer)

    def abort(self, request: Request) -> None:
        """End a request, if it has not ended already."""
        if answer := self._answers.of(request):
            self._end(answer, "abort")
            answer.abort()

    def abort_all(self) -> None:
        """End all requests."""
        for answer in self._answers:
            self.abort(answer.request)

    def _tire(self, answer: Answer) -> None:
        """A request has waited too long for its turn."""
        if not answer.request.num_admissions:
            self._end(answer, "error")
            answer.fail(NoTurn(f"no turn came within {self._limits.max_queue_seconds:g} s; try again later"))

    def _cut(self, answer: Answer) -> None:
        """A request has taken too long: it ends with what there is."""
        self._end(answer, "length")
        answer.cut()

    async def drained(self, seconds: float) -> bool:
        """Wait until no request is left, for ``seconds`` at most; whether that was enough."""
        return await self._answers.ended(seconds)

    async def run(self) -> None:
        """Run steps for ever; cancel to stop."""
        try:
            while True:
                await self._go_on_safely()
        except Exception:
            _log.exception("no more steps are run; restart the app")
            self._broken = True
            self._end_all()
            await self._agents.close()
            self._changed()

    async def _go_on_safely(self) -> None:
        """Go on, and whatever goes wrong, be able to go on after it."""
        try:
            await self._go_on()
        except Exception:
            # The connection may be between two messages, so a new one is made.
            _log.exception("a step raised")
            await self._agents.close()
            self._recover()

    async def _go_on(self) -> None:
        """Run steps until something happens to the agents, and see to that."""
        try:
            while True:
                await self._run_step()
        except AgentsTaken as error:
            self._requeue(crashed=False)
            _log.error("%s; %d requests wait, next attempt in %g s", error, len(self._answers), TAKEN_SECONDS)
            await asyncio.sleep(TAKEN_SECONDS)
        except AgentsLost as error:
            self._requeue(crashed=True)
            _log.warning("agents lost: %s; %d requests wait for them", error, len(self._answers))

    async def _run_step(self) -> None:
        """Send what there is to run, and see to what comes; a step that failed may be the last word of its agents."""
        try:
            if not self._agents.connected:
                await self._reconnect()
            self._send_steps()
            await self._wait()
        except StepFailed as error:
            _log.error("%s", error)
            await self._retry()

    async def _wait(self) -> None:
        """For the oldest step, for something to do, or to hear how the agents were lost."""
        if self._sent:
            await self._finish_step()
        elif self._agents.alive:
            await self._idle()
        else:
            await self._probe()

    def _send_steps(self) -> None:
        """Plan and send as many steps as may be in flight; none to agents that are lost: no request is to blame."""
        started = time.monotonic()
        while self._agents.alive and (step := self._scheduler.schedule()):
            sent = Sent(step, make_plan(step, self._hello.block_size))
            self._sent.append(sent)
            self._agents.send(sent.plan)
            now = time.monotonic()
            self._metrics.plan.observe(now - started)
            self._observer.sent(step, self._metrics, now)
            started = now

    async def _finish_step(self) -> None:
        """Wait for the oldest step; what the one before it brought goes to the clients meanwhile."""
        self._deliver()
        sent = self._sent[0]
        output = await self._agents.receive(sent.plan)
        self._last_answer = time.monotonic()
        self._metrics.agent.observe(output.step_seconds)
        self._metrics.device.observe(output.device_seconds)
        result = StepResult(sent.step, output)
        self._scheduler.update(sent.step, result.token_ids)
        self._sent.popleft()
        self._undelivered = result

    async def _idle(self) -> None:
        """Nothing is scheduled: pass on the last tokens and wait for work, with an eye on the agents."""
        self._deliver()
        self._scheduler.check_idle()
        self._work.clear()
        if not await happens(self._work, PROBE_SECONDS):
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
        result, self._undelivered, now = self._undelivered, None, time.monotonic()  # once, whatever goes wrong with it
        if result is None:
            return
        for request, prompt_tokens in result.prompt_tokens():
            if answer := self._answers.of(request):
                with self._failing_alone(answer):
                    answer.add_prompt_tokens([answer.token(*scored) for scored in prompt_tokens])
        for request in result.failed():
            if answer := self._answers.of(request):
                self._end(answer, "error")
                answer.fail(GenerationFailed("what the answer must be has become too complex to go on"))
        for request, scored in result.tokens():
            if answer := self._answers.of(request):
                with self._failing_alone(answer):
                    reason = answer.add_token(answer.token(*scored), request.finish_reason)
                    self._observer.token(request, now)
                    if reason:
                        self._end(answer, reason)
        self._metrics.post.observe(time.monotonic() - now)

    @contextlib.contextmanager
    def _failing_alone(self, answer: Answer) -> Iterator[None]:
        """What goes wrong with the text of one answer ends that one."""
        try:
            yield
        except Exception:
            _log.exception("request %s: its answer raised", answer.request.request_id)
            self._fail_answers([answer.request])

    def _end(self, answer: Answer, reason: FinishReason) -> None:
        """End a request, for whatever reason."""
        self._scheduler.finish(answer.request, reason)
        self._forget(answer, reason)

    def _forget(self, answer: Answer, reason: FinishReason) -> None:
        self._answers.drop(answer)
        self._observer.ended(answer.request, reason, time.monotonic())

    async def _retry(self) -> None:
        """The agents could not run the oldest step: find out whose fault that is, and let the others go on."""
        failed, *later = self._sent
        for sent in later:
            with contextlib.suppress(StepFailed):
                await self._agents.receive(sent.plan)  # it was planned on tokens that do not exist
        self._sent.clear()
        self._fail_answers(self._scheduler.fail(failed.step))

    def _requeue(self, *, crashed: bool) -> None:
        """The agents have gone, and their caches with them."""
        self._deliver()
        self._sent.clear()
        self._fail_answers(self._scheduler.requeue(crashed=crashed))
        self._changed()

    def _recover(self) -> None:
        """Something of ours went wrong: treat it as a crash, whose culprit is found in the end."""
        try:
            if self._scheduler.num_in_flight:
                self._requeue(crashed=True)
                self._scheduler.check()
                return
        except Exception:
            _log.exception("the scheduler is in no state to go on")
        self._start_over()

    def _start_over(self) -> None:
        """The scheduler cannot be trusted any more: all its requests end."""
        self._end_all()
        self._sent.clear()
        self._scheduler = self._new_scheduler()

    def _end_all(self) -> None:
        """End all requests with an error, without asking the scheduler."""
        self._undelivered = None
        for answer in self._answers:
            self._forget(answer, "error")
            answer.fail(_failure(answer.request))

    def _fail_answers(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if answer := self._answers.of(request):
                self._end(answer, "error")
                answer.fail(_failure(request))

    async def _reconnect(self) -> None:
        """Wait for the agents to come back; what is left of what was running is recomputed then, to the same tokens."""
        self._metrics.connections_lost.inc()
        while True:
            try:
                hello = await self._agents.connect()
                if alike(hello) != alike(self._hello) or hello.num_blocks != self._hello.num_blocks:
                    raise AgentsRefused("the agents came back with another model, cache or limits; restart the app")
            except AgentsRefused as refusal:
                _log.error("%s", refusal)
                self._refused = True
                await self._agents.close()
                self._changed()
                self._fail_answers([answer.request for answer in self._answers])
                await asyncio.sleep(REFUSED_SECONDS)  # until someone mends it
            else:
                _log.info("the agents are back")
                self._refused = False
                self._last_answer = time.monotonic()
                self._changed()
                return

    def _new_scheduler(self) -> Scheduler:
        hello, limits = self._hello, self._limits
        return Scheduler(
            BlockManager(hello.num_blocks, hello.block_size),
            max_num_seqs=min(hello.max_num_seqs, limits.max_num_seqs),
            max_num_batched_tokens=min(hello.max_num_batched_tokens, limits.max_num_batched_tokens),
            salt=self._salt,
            prefix_caching=limits.prefix_caching,
            chunks=hello.capabilities.cached_context,
            mixed=hello.capabilities.mixed_steps,
        )


def _failure(request: Request) -> GenerationFailed:
    where = f"the server's log says why, under request {request.request_id}"
    return GenerationFailed(f"the answer could not be finished; {where}")
