"""What the command line reads and writes: a person's terminal, or a pipe, which is UTF-8 and nothing but the text."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from io import TextIOWrapper

STDERR = 2  # the number of the last standard stream

# What could move a terminal's cursor, change its colours or its title
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def prepare() -> None:
    """Make pipes UTF-8, whatever the locale says, and have something behind each standard stream."""
    _open_what_is_closed()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")  # it may not have every character
            else:
                stream.reconfigure(encoding="utf-8")
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a line that can be edited)


def _open_what_is_closed() -> None:
    """A stream that was closed by whoever started this holds nothing, and what is written to it goes nowhere.

    Its number would be given to the next connection, and errors would be printed to standard output.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(number)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", STDERR, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def nobody_reads() -> None:
    """After a BrokenPipeError: what is still to be written, or will be when Python ends, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """A line for the person, not for the pipe."""
    print(_CONTROL.sub("\ufffd", line), file=sys.stderr, flush=True)


def write_line(line: str) -> None:
    """A line of the answer to a command."""
    print(_shown(line), flush=True)


def write_json(content: object) -> None:
    """One JSON object on a line."""
    print(json.dumps(content, ensure_ascii=False), flush=True)


def write_text(pieces: Iterable[str]) -> None:
    """Text as it comes, and a newline after it if it has none, also if it is interrupted."""
    last = ""
    try:
        for piece in pieces:
            last = piece or last
            print(_shown(piece), end="", flush=True)
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)


def lines_of_input() -> Iterator[str]:
    """The lines of standard input that say something; at a terminal, each after a prompt."""
    if not sys.stdin.isatty():
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    try:
        while True:
            if line := input("> " if sys.stdout.isatty() else "").strip():
                yield line
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()  # the shell's own prompt has a line for itself
        raise


def _shown(text: str) -> str:
    """``text`` as a terminal may have it; a pipe gets all of it."""
    return _CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text
