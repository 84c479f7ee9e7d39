"""One line of the doctor: what was looked at, what is there, and what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")


class Finding(msgspec.Struct, frozen=True):
    """What one check came to."""

    check: str  # what was looked at: a program, a variable, a key of the configuration
    level: Level  # warning: it works, but not as it should; error: it does not work
    found: str
    advice: str = ""  # what to do; empty where nothing is


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def error(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "error", found, advice)
