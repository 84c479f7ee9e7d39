"""What the launcher and an agent process say to each other.

The launcher writes one line of settings to the agent's standard input and keeps it open; when it closes, because the
launcher stopped or was killed in any way, the agent goes too. The agent writes one line to its standard output: that it
listens, or why it cannot. Once it listens, each further byte is a sign of life.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

import msgspec

from config.serving_config import ModelConfig, ServingConfig

MAX_REASON = 2000  # characters; native libraries can be long-winded, and the rest is in the agent's standard error
EXIT_SECONDS = 10.0  # that a step in progress may take once the launcher is gone


class AgentSettings(msgspec.Struct, frozen=True):
    """Which agent of which deployment a process is. The configuration is the launcher's, read once for all agents."""

    config: ServingConfig
    model_index: int
    group: int
    rank: int

    @property
    def model(self) -> ModelConfig:
        return self.config.models[self.model_index]

    @property
    def world_size(self) -> int:
        return len(self.model.groups[self.group])

    @property
    def port(self) -> int:
        return self.model.groups[self.group][self.rank]

    @property
    def address(self) -> str:
        return f"{self.model.agent_host}:{self.port}"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The agent listens."""

    pid: int
    model: str
    num_blocks: int
    block_size: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The agent cannot start."""

    reason: str


def read_settings() -> AgentSettings:
    """The agent's side: its settings, from standard input."""
    return msgspec.json.decode(sys.stdin.buffer.readline(), type=AgentSettings)


def exit_with_launcher() -> None:
    """The agent's side: from now on, ask this process to end when the launcher is gone, then make it.

    What makes it is a timer of the system: a rank that leaves after the rendezvous waits for that in MindSpore's code,
    which lets no thread of Python run.
    """

    def watch() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would be held when the process exits
            pass
        signal.setitimer(signal.ITIMER_REAL, EXIT_SECONDS)  # SIGALRM, which is left to its default, the end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


@contextlib.contextmanager
def ending_with_launcher() -> Iterator[None]:
    """Inside this, the system ends the process at once when the launcher is gone.

    For native code that lets no other thread run, so that ``exit_with_launcher`` could not act: the signal that says
    that something happened to standard input is left to its default, which is the end.
    """
    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        if select.select([0], [], [], 0)[0]:  # it was gone before we asked for the signal
            os.kill(os.getpid(), signal.SIGKILL)
        yield
    finally:
        fcntl.fcntl(0, fcntl.F_SETFL, flags)


class Report:
    """The agent's side: the line that says how its start went, and the signs of life after it.

    An error that nobody handles is a failed start. Libraries write to standard output as well, so it is led to standard
    error and the report keeps the original.
    """

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        sys.excepthook = self._failed

    def ready(self, message: Ready) -> None:
        sys.excepthook = sys.__excepthook__
        self._write(message)
        os.set_blocking(self._output.fileno(), False)

    def beat(self) -> None:
        """Give a sign of life, without waiting: a launcher that is stopped may let the pipe fill up."""
        with contextlib.suppress(OSError):  # full, or the launcher is gone, and soon this process as well
            os.write(self._output.fileno(), b"\n")

    def _failed(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._write(Failed(f"{kind.__name__}: {error}"[:MAX_REASON]))
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        os._exit(1)  # a rank that has not met the others can wait for them again, for minutes, as MindSpore is unloaded

    def _write(self, message: Ready | Failed) -> None:
        self._output.write(msgspec.json.encode(message) + b"\n")
        self._output.flush()
