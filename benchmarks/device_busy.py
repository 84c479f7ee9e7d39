"""How busy the device is under many streams: ``python -m benchmarks.device_busy``.

The stand-in model takes 25 ms a step, as a 7B model on one NPU would. App, agent and load client share this machine,
and tokens go to their clients over HTTP as they come. Busy is the time that the agent spends in the model, of all time.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.prompts import Prompt
from benchmarks.report import FOLDER
from benchmarks.servers import ROOT, Server, ours
from benchmarks.traffic import Traffic
from config.serving_config import load

STEP_SECONDS = 0.025
SEATS = 256
LOADS = ((64, 0), (128, 0), (256, 0), (256, 1000))  # streams, and requests that wait for a seat meanwhile
TOKENS = 4000  # of each answer: more than the measurement takes
LOOK_SECONDS = 0.2  # between two looks at whether all streams run


@dataclass(frozen=True)
class Snapshot:
    """What the server had counted at one time."""

    at: float  # seconds
    values: dict[str, float]  # by name, without prefix

    @classmethod
    async def take(cls, client: httpx.AsyncClient) -> Snapshot:
        text = (await client.get("/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return cls(time.perf_counter(), {s.name.removeprefix("mindspore_llm_"): s.value for s in samples})


async def measure(server: Server, streams: int, waiting: int, seconds: float) -> str:
    """One row of the table."""
    work = [Prompt(f"stream {number}", TOKENS) for number in range(streams + waiting)]
    async with httpx.AsyncClient(base_url=server.target.url, trust_env=False, timeout=60) as client:
        traffic = asyncio.create_task(Traffic(server.target, 600).closed_loop(work, len(work)))
        try:
            before = await _once(client, num_requests_running=streams, num_requests_waiting=waiting)
            await asyncio.sleep(seconds)
            after = await Snapshot.take(client)
        finally:
            traffic.cancel()
            await asyncio.gather(traffic, return_exceptions=True)
        await _once(client, num_requests_running=0)
    return row(streams, waiting, before, after)


async def _once(client: httpx.AsyncClient, **wanted: int) -> Snapshot:
    """A snapshot in which these gauges stand so; only asking tells when they do."""
    async for snapshot in _snapshots(client):
        if all(snapshot.values[name] == number for name, number in wanted.items()):
            return snapshot
    raise AssertionError("there is always another one")


async def _snapshots(client: httpx.AsyncClient) -> AsyncIterator[Snapshot]:
    while True:
        yield await Snapshot.take(client)
        await asyncio.sleep(LOOK_SECONDS)


def row(streams: int, waiting: int, before: Snapshot, after: Snapshot) -> str:
    """What happened between two snapshots."""
    seconds = after.at - before.at

    def grown(name: str) -> float:
        return after.values[name] - before.values[name]

    steps = grown("step_device_seconds_count")
    numbers = [
        f"{100 * grown('step_device_seconds_sum') / seconds:.1f} %",
        f"{1000 * seconds / steps:.1f} ms",
        *(f"{1000 * grown(f'step_{part}_seconds_sum') / steps:.2f} ms" for part in ("plan", "post")),
        f"{grown('generation_tokens_total') / seconds:,.0f}",
    ]
    return f"| {streams} | {waiting or ''} | {' | '.join(numbers)} |"


@contextmanager
def standin() -> Iterator[Server]:
    """The app and an agent of a stand-in with this step time, on free ports."""
    with closing(socket.socket()) as app, closing(socket.socket()) as agent:
        for one in (app, agent):
            one.bind(("127.0.0.1", 0))
        ports = app.getsockname()[1], agent.getsockname()[1]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "device_busy.yaml"
    model: dict[str, Any] = {
        "path": "config/standin",
        "names": ["standin"],
        "agent_ports": [ports[1]],
        "target": "standin",
    }
    model |= {"cache_memory": "16MiB", "step_seconds": STEP_SECONDS}
    limits = {"max_num_seqs": SEATS, "max_queue_seconds": None, "max_connections": 2 * (SEATS + 1000)}
    content = {"models": [model], "server": {"port": ports[0]}, "limits": limits, "logging": {"folder": str(FOLDER)}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    server = ours(str(path.relative_to(ROOT)), load(path))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def main() -> int:
    """Measure all loads and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_busy", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default: %(default)s)")
    seconds: float = parser.parse_args().seconds
    lines = [
        f"| streams | waiting | device busy | a step of {1000 * STEP_SECONDS:.0f} ms took | plan | post | tokens/s |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    with standin() as server:
        for streams, waiting in LOADS:
            lines.append(asyncio.run(measure(server, streams, waiting, seconds)))
            print(lines[-1], flush=True)
    (FOLDER / "busy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
