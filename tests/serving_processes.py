"""The real processes of a deployment for tests: agents and app on free ports, started and stopped as a user would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from config.free_ports import free_ports

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0  # far more than needed, also on a busy machine
STOP_SECONDS = 30.0
PATIENCE_SECONDS = 20.0


class Process:
    """One child process whose output is read as it comes. It gets a session of its own, as a daemon would."""

    def __init__(self, *arguments: str | Path, cwd: Path = ROOT) -> None:
        self.lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._child = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        """Wait until a line of the output holds ``text``."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._seen(text) or self._ended, seconds)
        assert found, f"not within {seconds} s: {text!r}\n{self.output}"
        assert self._seen(text), f"ended with {self.wait()} without {text!r}\n{self.output}"

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit code, once it has ended."""
        code = self._child.wait(seconds)
        self._reader.join(seconds)
        return code

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def stop(self) -> int:
        """SIGTERM and the exit code; nothing of it is left afterwards, whatever happens."""
        children = self.children() if self._child.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            self._child.terminate()
        try:
            return self.wait()
        finally:
            self._child.kill()
            self._child.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    def _seen(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as output:
            for line in output:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@dataclass
class Serving:
    """A deployment on the stand-in model: its configuration file and, once started, its processes."""

    config_path: Path
    port: int
    agents: Process | None = None
    app: Process | None = None
    clients: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.config_path.parent / "logs" / "server_app.log").read_text(encoding="utf-8")

    def start_agents(self) -> Process:
        self.agents = Process("start_agent.py", "--config", self.config_path)
        self.agents.wait_for("all agents started")
        return self.agents

    def start_app(self) -> Process:
        self.app = Process("client/server_app_post.py", "--config", self.config_path)
        self.app.wait_for("mindspore serving is started.")
        return self.app

    def client(self, **settings: Any) -> httpx.Client:
        """An HTTP client of the app; it is closed with the deployment."""
        limits = httpx.Limits(max_connections=None)
        client = httpx.Client(base_url=self.url, timeout=START_SECONDS, limits=limits, trust_env=False, **settings)
        return self.clients.enter_context(client)

    def stop(self) -> None:
        self.clients.close()
        for process in (self.app, self.agents):
            if process is not None:
                process.stop()


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Ask until ``condition`` holds. It asks a server or a process, which sets the pace."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"


def standin_deployment(
    folder: Path, models: Sequence[Mapping[str, Any]] = ({},), **sections: Mapping[str, Any]
) -> Serving:
    """Write a configuration of stand-in models into ``folder``, on free ports.

    Each of ``models`` changes the defaults of one model, ``sections`` those of the other sections.
    """
    port, *agent_ports = free_ports(1 + len(models))
    content = {
        "server": {"port": port, **sections.get("server", {})},
        "limits": dict(sections.get("limits", {})),
        "metrics": dict(sections.get("metrics", {})),
        "logging": {"folder": str(folder / "logs"), **sections.get("logging", {})},
        "models": [
            {
                "path": "config/standin",
                "names": ["llama2", "internlm"] if i == 0 else [f"model{i}"],
                "target": "standin",
                "agent_ports": [agent_port],
                "cache_memory": "4MiB",
                **model,
            }
            for i, (agent_port, model) in enumerate(zip(agent_ports, models, strict=True))
        ],
    }
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return Serving(path, port)


@contextlib.contextmanager
def serving(
    folder: Path, models: Sequence[Mapping[str, Any]] = ({},), **sections: Mapping[str, Any]
) -> Iterator[Serving]:
    """Agents and app of a stand-in deployment, ready for requests. In the end, nothing unforeseen was logged."""
    deployment = standin_deployment(folder, models, **sections)
    try:
        deployment.start_agents()
        deployment.start_app()
        yield deployment
    finally:
        deployment.stop()
    assert "Traceback" not in deployment.log, deployment.log
