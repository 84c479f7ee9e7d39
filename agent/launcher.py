"""The owner of all agents of a deployment: it starts them, watches them, starts them again, and stops them."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path
from typing import Any

import msgspec

from agent.child_process import StartError
from agent.rank_group import RankGroup
from agent.tasks import together
from config.agents_state import AgentsState, write_state
from config.secret_file import create_secret
from config.serving_config import ServingConfig

RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds; one more death in a row, and the group is given up
STABLE_SECONDS = 10.0  # of service, and a restart has not failed, whatever comes then

logger = logging.getLogger(__name__)


class Launcher:
    """Runs the agents of a checked configuration until a signal ends it or no group is left."""

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._groups = [
            RankGroup(config, index, group)
            for index, model in enumerate(config.models)
            for group in range(model.data_parallel)
        ]
        start = AgentsState(phase="starting", attempts=len(RESTART_DELAYS))
        self._states = {group.name: start for group in self._groups}
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
            await together(group.stop() for group in self._groups)
            for path in secrets:
                path.unlink(missing_ok=True)
            for group in self._groups:
                if self._states[group.name].phase != "given up":  # which the app has to know also when we are gone
                    group.state_path.unlink(missing_ok=True)
            logger.info("all agents stopped")

    def _stop(self) -> None:
        """A first signal stops the agents in order, a second one at once."""
        if self._stopping.is_set():
            for group in self._groups:
                group.kill()
        logger.info("stopping")
        self._stopping.set()

    async def _serve(self, secrets: list[Path]) -> int:
        for path in secrets:
            create_secret(path)
        for group in self._groups:
            self._say(group)
        try:
            await together(self._start(group) for group in self._groups)
        except StartError as error:
            logger.error("%s", error)
            return 1
        print("all agents started", flush=True)  # noqa: T201
        await together(self._keep(group) for group in self._groups)
        logger.error("no model is left to serve")
        return 1

    async def _start(self, group: RankGroup) -> None:
        """Start a group and wait until it is ready.

        Raises:
            StartError: it is not going to be.
        """
        await group.start()
        self._say(group, phase="ready")

    async def _keep(self, group: RankGroup) -> None:
        """Start a group again whenever it has lost a process; return when that is hopeless."""
        reason, seconds = await self._service(group)
        deaths = 0
        while True:
            deaths = 1 if seconds >= STABLE_SECONDS else deaths + 1
            if deaths > len(RESTART_DELAYS):
                self._say(group, phase="given up", reason=reason)
                logger.error("%s; giving up %s after %d restarts in a row", reason, group.name, len(RESTART_DELAYS))
                return await group.stop()
            delay = RESTART_DELAYS[deaths - 1]
            restarts = self._states[group.name].restarts + 1
            self._say(group, phase="restarting", attempt=deaths, reason=reason, restarts=restarts)
            logger.warning("%s; starting %s again in %g s", reason, group.name, delay)
            await group.stop()
            await asyncio.sleep(delay)
            try:
                await self._start(group)
                reason, seconds = await self._service(group)
            except StartError as error:
                reason, seconds = str(error), 0.0

    async def _service(self, group: RankGroup) -> tuple[str, float]:
        """Wait until a ready group has lost a process: how, and after how many seconds of service."""
        started = time.monotonic()
        return await group.life(), time.monotonic() - started

    def _say(self, group: RankGroup, **changes: Any) -> None:
        """Tell the app how a group is now."""
        self._states[group.name] = msgspec.structs.replace(self._states[group.name], **changes)
        try:
            write_state(group.state_path, self._states[group.name])
        except OSError as error:  # on a full disk agents can serve on
            logger.error("%s: cannot be written: %s", group.state_path, error.strerror)
