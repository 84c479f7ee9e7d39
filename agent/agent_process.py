"""One agent's process, as the launcher sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec

from agent.child_process import ChildProcess, StartError, spawn
from agent.lifeline import AgentSettings, Failed, Ready
from config.silence import Silence

SILENCE_SECONDS = 5.0  # of a ready agent, before it is taken to be stuck: stopped, or inside native code for ever


class AgentProcess(ChildProcess):
    """A started agent."""

    def __init__(self, settings: AgentSettings, process: asyncio.subprocess.Process) -> None:
        super().__init__(f"agent {settings.address}", process)
        self._errors = errors_file(settings)

    @classmethod
    async def start(cls, settings: AgentSettings, environment: Mapping[str, str]) -> AgentProcess:
        """Start the process and tell it who it is; ``environment`` goes on top of ours.

        Raises:
            StartError: the system does not give us another process.
        """
        process = await spawn(f"agent {settings.address}", "agent", errors_file(settings), environment)
        assert process.stdin
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        return cls(settings, process)

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
        reason = report.reason if report else f"see {self._errors}"
        raise StartError(f"{await self.ended()}, cannot start: {reason}")

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


def errors_file(settings: AgentSettings) -> Path:
    """Where an agent's standard error goes, from its latest start on: tracebacks, and what native libraries write."""
    return Path(settings.config.logging.folder) / f"agent-{settings.port}.stderr"
