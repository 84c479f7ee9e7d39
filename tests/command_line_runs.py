"""``python -m client``, run in a process of its own or in the test's."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from typing import Any

import pytest
from serving_processes import ROOT

from client.command_line import main

PLAIN = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(*words: str, **settings: Any) -> subprocess.Popen[bytes]:
    """The command in pipes, in a locale that knows ASCII only."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen([sys.executable, "-m", "client", *words], cwd=ROOT, env=PLAIN, **pipes)


def run_process(*words: str, given: bytes = b"") -> tuple[int, str, str]:
    """Exit code, output and errors of the command as its own process."""
    with start(*words) as process:
        out, err = process.communicate(given, timeout=60)
    return process.returncode, out.decode(), err.decode()


def run(*words: str, given: str = "") -> tuple[int, str, str]:
    """The same in this process, which is faster."""
    streams = [io.TextIOWrapper(io.BytesIO(content), "ascii") for content in (given.encode(), b"", b"")]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as closing:
        for name, one in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, closing.enter_context(one))
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        streams[2].flush()
        _, out, err = (one.buffer.getvalue().decode() for one in streams)  # type: ignore[attr-defined]
    return code, out, err
