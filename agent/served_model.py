"""A deployment that is started to be tried: ``start.py`` in a process of its own, stopped in the end."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from config.free_ports import free_ports

ROOT = Path(__file__).resolve().parent.parent
NAME = "accepted"  # under which it is served
STARTED = "mindspore serving is started."  # what start.py says once it serves
STOP_SECONDS = 60.0


class NotServed(Exception):
    """The deployment did not start; the message is what it printed last."""


@contextlib.contextmanager
def served(folder: Path, model: Mapping[str, Any], ranks: int, start_seconds: float) -> Iterator[str]:
    """Serve one model on free ports of loopback: the app's URL. Configuration and logs are in ``folder``.

    Raises:
        NotServed: it ended instead, or was not ready in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, *agent_ports = free_ports(1 + ranks)
    path = folder / "deployment.json"  # JSON is YAML
    content = {
        "models": [{"names": [NAME], "agent_ports": agent_ports, **model}],
        "server": {"port": port, "drain_seconds": 0.0},
        "logging": {"folder": str(folder)},
    }
    path.write_bytes(msgspec.json.encode(content))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "start.py"), "--config", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        _wait(process, start_seconds)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its agents end with it
            process.wait()


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Return once it serves; its output is read on, so that it never waits for us."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                lines.put(line.strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last: list[str] = []
    with contextlib.suppress(queue.Empty):
        while (line := lines.get(timeout=seconds)) is not None:
            if line == STARTED:
                return
            last = [*last[-4:], line]
        raise NotServed("; ".join(last) or "it ended without a word")
    raise NotServed(f"not ready: {seconds:g} s without a sign of life")
