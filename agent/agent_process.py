"""One agent's process, as the launcher sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from agent.lifeline import AgentSettings, Failed, Ready
from config.silence import Silence

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 5.0  # of a ready agent, before it is taken to be stuck: stopped, or inside native code for ever

ROOT = Path(__file__).resolve().parent.parent


class StartError(Exception):
    """An agent ended before it was ready; the message says why."""


class AgentProcess:
    """A started agent. Nothing of it outlives the launcher, see ``agent.lifeline``."""

    def __init__(self, settings: AgentSettings, process: asyncio.subprocess.Process) -> None:
        self._settings = settings
        self._process = process

    @classmethod
    async def start(cls, settings: AgentSettings) -> AgentProcess:
        """Start the process and tell it who it is.

        Raises:
            StartError: the system does not give us another process.
        """
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            with errors_file(settings).open("wb") as errors:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "agent"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C is for the launcher, which tells the agents
                )
        except OSError as error:
            raise StartError(f"agent {settings.model.agent_host}:{settings.port} cannot be started: {error}") from None
        assert process.stdin
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        return cls(settings, process)

    @property
    def address(self) -> str:
        return f"{self._settings.model.agent_host}:{self._settings.port}"

    async def ready(self) -> Ready:
        """Wait until the agent listens.

        Raises:
            StartError: it ended instead.
        """
        assert self._process.stdout
        line = await self._process.stdout.readline()
        report = msgspec.json.decode(line, type=Ready | Failed) if line else None  # None: it died without a word
        if isinstance(report, Ready):
            return report
        reason = report.reason if report else f"see {errors_file(self._settings)}"
        raise StartError(f"{await self.ended()}, cannot start: {reason}")

    async def ended(self) -> str:
        """Wait until the process has ended, and say how."""
        code = await self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"agent {self.address} {how}"

    async def life(self) -> str:
        """Wait until a ready agent has ended, and say how; one that gives no sign of life is ended."""
        silence = Silence(SILENCE_SECONDS)
        ended, silent = asyncio.create_task(self.ended()), asyncio.create_task(silence.too_long())
        listening = asyncio.create_task(self._listen(silence))
        try:
            await asyncio.wait({ended, silent}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return ended.result()
            self.kill()
            return f"{await ended} after no sign of life for {SILENCE_SECONDS:g} s"
        finally:
            for task in (ended, silent, listening):
                task.cancel()
            await asyncio.gather(ended, silent, listening, return_exceptions=True)

    async def _listen(self, silence: Silence) -> None:
        assert self._process.stdout
        while await self._process.stdout.read(4096):
            silence.broken()

    async def stop(self, grace_seconds: float) -> None:
        """Ask the process to end, make it end after ``grace_seconds``, and wait for it."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        except asyncio.TimeoutError:
            logger.error("agent %s does not stop", self.address)
            self.kill()
        logger.info("%s", await self.ended())

    def kill(self) -> None:
        """End the process at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self._process.send_signal(number)


def errors_file(settings: AgentSettings) -> Path:
    """Where an agent's standard error goes, from its latest start on: tracebacks, and what native libraries write."""
    return Path(settings.config.logging.folder) / f"agent-{settings.port}.stderr"
