"""All groups of one model's agents behind one door: a request goes to one, and on to another if that is lost.

A group has a queue, a cache and a loop of its own and knows of no other. Here is who comes and goes, and what then
becomes of requests; whom a request goes to is the policy of ``server/dispatcher.py``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Sequence

from agent.protocol import Hello
from config.manifest import Manifest
from config.serving_config import ModelConfig, ServingConfig
from server.agent_group import AgentsRefused, alike
from server.answer import Answer
from server.dispatcher import choose
from server.metrics import ModelMetrics
from server.observer import Observer
from server.replica import Replica
from server.request import Request
from server.step_loop import REFUSED_SECONDS, StepLoop
from server.tracing import open_spans

_log = logging.getLogger(__name__)


class Replicas:
    """The replicas of one model, in the order of their groups. All on one event loop."""

    def __init__(self, model: ModelConfig, config: ServingConfig, manifest: Manifest, metrics: ModelMetrics) -> None:
        self._replicas = tuple(
            Replica(model, group, config, manifest, metrics.group(group)) for group in range(len(model.groups))
        )
        self._name = model.names[0]
        self._limits = config.limits
        self._metrics = metrics
        self._observer = Observer(metrics, open_spans(self._name))
        self._salt = secrets.token_bytes(32)
        self._hello: Hello | None = None  # of the group that came first, to which the others must be alike
        self._refused: dict[Replica, AgentsRefused] = {}
        self._first = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    @property
    def met(self) -> bool:
        """Whether the agents of any group have greeted."""
        return bool(self._loops)

    @property
    def ready(self) -> bool:
        """Whether any group has answered lately."""
        return any(replica.ready for replica in self._replicas)

    @property
    def given_up(self) -> bool:
        """Whether there is nothing that a request could wait for."""
        return all(loop.given_up for loop in self._loops)

    @property
    def num_waiting(self) -> int:
        """Requests in all queues."""
        return sum(loop.num_waiting for loop in self._loops)

    @property
    def max_model_len(self) -> int | None:
        """Tokens of a prompt and its answer together: the least that a group takes; None before the first has come.

        It counts groups that are away, so that what a client may ask for does not change with a restart.
        """
        return min((loop.max_model_len for loop in self._loops), default=None)

    @property
    def _loops(self) -> list[StepLoop]:
        return [replica.loop for replica in self._replicas if replica.loop]

    async def start(self) -> None:
        """Wait for the agents of one group; the others join as they come.

        Raises:
            AgentsRefused: the agents of all groups are there, and cannot serve this model.
        """
        self._tasks = [
            asyncio.create_task(self._serve(replica), name=f"steps of {self._name} at {replica.agents.place}")
            for replica in self._replicas
        ]
        first = asyncio.create_task(self._first.wait())
        try:
            done, _ = await asyncio.wait((first, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what kept all groups from serving
        finally:
            first.cancel()

    async def drained(self, seconds: float) -> bool:
        """Wait until no request is left, for ``seconds`` at most; whether that was enough."""
        end = time.monotonic() + seconds
        while busy := [loop for loop in self._loops if not loop.empty]:
            if not await busy[0].drained(max(0.0, end - time.monotonic())):
                return False
        return True

    async def stop(self) -> None:
        """End all requests and leave the agents."""
        for loop in self._loops:
            loop.abort_all()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for replica in self._replicas:
            await replica.agents.close()

    def add(self, answers: Sequence[Answer]) -> None:
        """Queue the answers to one prompt, all in one group: one that is ready, else one that may come back."""
        ready = [loop for loop in self._loops if loop.ready]
        loop = _chosen(answers[0].request, ready or [loop for loop in self._loops if not loop.given_up])
        assert loop is not None, "the request was checked against the group that takes the least"
        for answer in answers:
            loop.add(answer)
            self._observer.accepted(answer.request)

    def abort(self, request: Request) -> None:
        """End a request, wherever it is, if it has not ended already."""
        for loop in self._loops:
            loop.abort(request)

    async def _serve(self, replica: Replica) -> None:
        """Wait for the agents of one group, and run its steps for ever."""
        hello = await self._meet(replica)
        replica.loop = StepLoop(
            replica.agents,
            hello,
            self._limits,
            salt=self._salt,
            metrics=replica.metrics,
            observer=self._observer,
            changed=self._move_requests,
        )
        context = replica.loop.max_model_len
        where = self._name, replica.agents.place
        _log.info("%s: the agents at %s have %d cache blocks, context %d", *where, hello.num_blocks, context)
        self._first.set()
        self._move_requests()
        await replica.loop.run()

    async def _meet(self, replica: Replica) -> Hello:
        """The first greeting of a group that can serve.

        Raises:
            AgentsRefused: it cannot, and no other can.
        """
        while True:
            try:
                hello = await replica.agents.connect()
                self._hello = self._hello or hello
                if alike(hello) != alike(self._hello):
                    others = "have another model or other limits than those of the group that came first"
                    raise AgentsRefused(f"the agents at {replica.agents.place} {others}; restart the agents")
                return hello
            except AgentsRefused as refusal:
                await replica.agents.close()
                self._refused[replica] = refusal
                if len(self._refused) == len(self._replicas):
                    raise
                _log.error("%s", refusal)
            await asyncio.sleep(REFUSED_SECONDS)  # until someone mends it
            del self._refused[replica]

    def _move_requests(self) -> None:
        """Agents have come or gone: let groups that are there have what waits at those that are not."""
        ready = [loop for loop in self._loops if loop.ready]
        for loop in self._loops:
            for answer in loop.movable() if ready else ():
                if other := _chosen(answer.request, ready):
                    loop.remove(answer)
                    other.add(answer)
                    self._metrics.moved.inc()


def _chosen(request: Request, loops: Sequence[StepLoop]) -> StepLoop | None:
    """The loop that gets a request; None if it has room in none."""
    fitting = [loop for loop in loops if loop.fits(request)]
    if len(fitting) == 1:
        return fitting[0]
    return fitting[choose([loop.load(request) for loop in fitting])] if fitting else None
