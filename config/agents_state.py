"""How the agents of a model are, in a file beside their secret: written by the launcher, read by the app."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

LONGEST_STATE = 16 << 10  # bytes


class AgentsState(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows of one model's agents."""

    phase: Literal["starting", "ready", "restarting", "given up"]
    attempt: int = 0  # restarts in a row, with this one
    attempts: int = 0  # after so many the model is given up
    reason: str = ""  # of the latest restart
    restarts: int = 0  # since the launcher started

    def __str__(self) -> str:
        return f"{self.summary}: {self.reason}" if self.phase in ("restarting", "given up") else self.phase

    @property
    def summary(self) -> str:
        """The state without the reason, which may name files and so is for logs only."""
        if self.phase == "restarting":
            return f"restart {self.attempt} of {self.attempts}"
        if self.phase == "given up":
            return f"given up after {self.attempts} restarts in a row"
        return self.phase


def write_state(path: Path, state: AgentsState) -> None:
    """Put ``state`` at ``path``, readable by the owner only; a reader finds the one before or this one, whole."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "wb") as output:
        output.write(msgspec.json.encode(state))
    fresh.replace(path)


def read_state(path: Path) -> AgentsState | None:
    """The state at ``path``; None if there is none that can be read, as for agents on another host."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(LONGEST_STATE), type=AgentsState)
    except (OSError, msgspec.DecodeError):
        return None
