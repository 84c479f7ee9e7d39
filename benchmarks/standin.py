"""The stand-in model as a server to measure: the processes of a deployment, and what they have counted."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import FOLDER
from benchmarks.servers import Server
from benchmarks.target import Target
from config.free_ports import free_ports

NAME = "standin"  # the served one
LOOK_SECONDS = 0.2  # between two looks at what the server counts


@dataclass(frozen=True)
class Snapshot:
    """What the server had counted at one time."""

    at: float  # seconds of ``time.perf_counter``
    values: dict[str, float]  # by name, without prefix

    @classmethod
    async def take(cls, client: httpx.AsyncClient) -> Snapshot:
        text = (await client.get("/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return cls(time.perf_counter(), {s.name.removeprefix("mindspore_llm_"): s.value for s in samples})

    def since(self, earlier: Snapshot, name: str) -> float:
        """How much a counter has grown."""
        return self.values[name] - earlier.values[name]


async def once(client: httpx.AsyncClient, **wanted: int) -> Snapshot:
    """A snapshot in which these gauges stand so; only asking tells when they do."""
    async for snapshot in _snapshots(client):
        if all(snapshot.values[name] == number for name, number in wanted.items()):
            return snapshot
    raise AssertionError("there is always another one")


async def _snapshots(client: httpx.AsyncClient) -> AsyncIterator[Snapshot]:
    while True:
        yield await Snapshot.take(client)
        await asyncio.sleep(LOOK_SECONDS)


@contextmanager
def standin(step_seconds: float, limits: dict[str, Any], agent_port: int, seen_port: int) -> Iterator[Server]:
    """The app, and an agent with this step time at ``agent_port``; the app looks for it at ``seen_port``.

    They may be starting still: ``wait`` for them.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    model: dict[str, Any] = {"path": "config/standin", "names": [NAME], "target": "standin", "cache_memory": "16MiB"}
    model |= {"step_seconds": step_seconds}
    config = {"server": {"port": port}, "limits": limits, "logging": {"folder": str(FOLDER)}}
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as running:

        def start(name: str, script: str, **settings: Any) -> Server:
            path = FOLDER / f"{name}.yaml"
            path.write_text(yaml.safe_dump({**config, "models": [{**model, **settings}]}), encoding="utf-8")
            command = [sys.executable, script, "--config", str(path)]
            server = Server(name, Target("ours", url, NAME), command, "/health/ready")
            running.callback(server.stop)
            return server

        start("standin_agent", "start_agent.py", agent_ports=[agent_port])
        secret = str(FOLDER / f"agents-{agent_port}.secret")
        yield start("standin_app", "client/server_app_post.py", agent_ports=[seen_port], secret_file=secret)
