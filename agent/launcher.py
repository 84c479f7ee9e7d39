"""The owner of all agents of a deployment: it starts them, watches them, starts them again, and stops them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec

from agent.agent_process import AgentProcess, StartError
from agent.lifeline import AgentSettings
from config.agents_state import AgentsState, write_state
from config.secret_file import create_secret
from config.serving_config import ServingConfig

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL: a step in progress may finish
RESTART_GRACE_SECONDS = 1.0  # the same where another rank has ended: no step of the others can count any more
RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds; one more death in a row, and the model is given up
STABLE_SECONDS = 10.0  # of service, and a restart has not failed, whatever comes then

logger = logging.getLogger(__name__)


class Launcher:
    """Runs the agents of a checked configuration until a signal ends it or no model is left."""

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._agents: list[list[AgentProcess]] = [[] for _ in config.models]  # by model and rank
        self._states = [AgentsState(phase="starting", attempts=len(RESTART_DELAYS)) for _ in config.models]
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Start the agents, keep them running, stop them: the exit code of the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        secrets = [self._config.secret_path(model) for model in self._config.models if model.secret_file is None]
        serving = asyncio.create_task(self._serve(secrets))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return serving.result() if serving.done() else 0
        finally:
            for task in (serving, stopping):
                task.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)
            await _together(self._stop_model(index) for index in range(len(self._agents)))
            for path in secrets:
                path.unlink(missing_ok=True)
            for model, state in zip(self._config.models, self._states, strict=True):
                if state.phase != "given up":  # which the app has to know also when we are gone
                    self._config.state_path(model).unlink(missing_ok=True)
            logger.info("all agents stopped")

    def _stop(self) -> None:
        """A first signal stops the agents in order, a second one at once."""
        if self._stopping.is_set():
            for agent in itertools.chain.from_iterable(self._agents):
                agent.kill()
        logger.info("stopping")
        self._stopping.set()

    async def _serve(self, secrets: list[Path]) -> int:
        for path in secrets:
            create_secret(path)
        for index in range(len(self._agents)):
            self._say(index)
        try:
            await _together(self._start_model(index) for index in range(len(self._agents)))
        except StartError as error:
            logger.error("%s", error)
            return 1
        print("all agents started", flush=True)  # noqa: T201
        await _together(self._watch_model(index) for index in range(len(self._agents)))
        logger.error("no model is left to serve")
        return 1

    async def _start_model(self, index: int) -> None:
        """Start all ranks of a model and wait until they are ready.

        Raises:
            StartError: one of them is not going to be.
        """
        self._agents[index] = []
        ranks = range(len(self._config.models[index].agent_ports))
        for rank in ranks:
            self._agents[index].append(await AgentProcess.start(AgentSettings(self._config, index, rank)))
        await _together(self._announce(agent, rank) for rank, agent in enumerate(self._agents[index]))
        self._say(index, phase="ready")

    async def _announce(self, agent: AgentProcess, rank: int) -> None:
        ready = await agent.ready()
        line = f"agent {agent.address} is ready: rank {rank} of {ready.model}, pid {ready.pid}, "
        line += f"{ready.num_blocks:,} blocks of {ready.block_size} tokens"
        logger.info("%s", line)
        print(line, flush=True)  # noqa: T201

    async def _watch_model(self, index: int) -> None:
        """Start a model's ranks again, all of them, whenever one has ended; return when that is hopeless."""
        reason, seconds = await self._life(index)
        deaths = 0
        while True:
            deaths = 1 if seconds >= STABLE_SECONDS else deaths + 1
            if deaths > len(RESTART_DELAYS):
                names = ", ".join(self._config.models[index].names)
                self._say(index, phase="given up", reason=reason)
                logger.error("%s; giving up %s after %d restarts in a row", reason, names, len(RESTART_DELAYS))
                return await self._stop_model(index, RESTART_GRACE_SECONDS)
            delay = RESTART_DELAYS[deaths - 1]
            restarts = self._states[index].restarts + 1
            self._say(index, phase="restarting", attempt=deaths, reason=reason, restarts=restarts)
            logger.warning("%s; starting its model again in %g s", reason, delay)
            await self._stop_model(index, RESTART_GRACE_SECONDS)
            await asyncio.sleep(delay)
            try:
                await self._start_model(index)
                reason, seconds = await self._life(index)
            except StartError as error:
                reason, seconds = str(error), 0.0

    async def _life(self, index: int) -> tuple[str, float]:
        """Wait until an agent of a ready model has ended: how, and after how many seconds of service."""
        started = time.monotonic()
        ends = [asyncio.create_task(agent.life()) for agent in self._agents[index]]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result(), time.monotonic() - started
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)  # the pipes are free for the next reader

    def _say(self, index: int, **changes: Any) -> None:
        """Tell the app how a model's agents are now."""
        self._states[index] = msgspec.structs.replace(self._states[index], **changes)
        path = self._config.state_path(self._config.models[index])
        try:
            write_state(path, self._states[index])
        except OSError as error:  # on a full disk agents can serve on
            logger.error("%s: cannot be written: %s", path, error.strerror)

    async def _stop_model(self, index: int, grace_seconds: float = GRACE_SECONDS) -> None:
        await _together(agent.stop(grace_seconds) for agent in self._agents[index])


async def _together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all at a time; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
