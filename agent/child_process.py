"""A process that the launcher owns: started so that nothing of it outlives the launcher, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent


class StartError(Exception):
    """A process ended before it was ready; the message says why."""


class ChildProcess:
    """A started process. It goes when its standard input closes, see ``agent.lifeline``."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        """``name`` is what messages call it."""
        self.name = name
        self._process = process

    async def ended(self) -> str:
        """Wait until the process has ended, and say how."""
        code = await self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"{self.name} {how}"

    async def stop(self, grace_seconds: float) -> None:
        """Ask the process to end, make it end after ``grace_seconds``, and wait for it."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        except asyncio.TimeoutError:
            logger.error("%s does not stop", self.name)
            self.kill()
        logger.info("%s", await self.ended())

    def kill(self) -> None:
        """End the process at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self._process.send_signal(number)


async def spawn(
    name: str, module: str, errors: Path, environment: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start ``python -m module`` with pipes to its standard input and output; ``errors`` takes its standard error.

    Raises:
        StartError: the system does not give us another process.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        with errors.open("wb") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the launcher, which tells its children
            )
    except OSError as error:
        raise StartError(f"{name} cannot be started: {error}") from None
