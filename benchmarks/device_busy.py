"""How busy the device is under many streams: ``python -m benchmarks.device_busy``.

The stand-in model takes 25 ms a step, as a 7B model on one NPU would. App, agent and load client share this machine,
and tokens go to their clients over HTTP as they come. Busy is the time that the agent spends in the model, of all time.
"""

from __future__ import annotations

import argparse
import asyncio

import httpx

from benchmarks import result_files
from benchmarks.prompts import Prompt
from benchmarks.report import FOLDER
from benchmarks.servers import Server
from benchmarks.standin import Snapshot, once, standin
from benchmarks.traffic import Traffic
from config.free_ports import free_ports

STEP_SECONDS = 0.025
SEATS = 256
LOADS = ((64, 0), (128, 0), (256, 0), (256, 1000))  # streams, and requests that wait for a seat meanwhile
TOKENS = 4000  # of each answer: more than the measurement takes
LIMITS = {"max_num_seqs": SEATS, "max_queue_seconds": None, "max_connections": 2 * (SEATS + 1000)}


async def measure(server: Server, streams: int, waiting: int, seconds: float) -> str:
    """One row of the table."""
    work = [Prompt(f"stream {number}", TOKENS) for number in range(streams + waiting)]
    async with httpx.AsyncClient(base_url=server.target.url, trust_env=False, timeout=60) as client:
        traffic = asyncio.create_task(Traffic(server.target, 600).closed_loop(work, len(work)))
        try:
            before = await once(client, num_requests_running=streams, num_requests_waiting=waiting)
            await asyncio.sleep(seconds)
            after = await Snapshot.take(client)
        finally:
            traffic.cancel()
            await asyncio.gather(traffic, return_exceptions=True)
        await once(client, num_requests_running=0)
    return row(streams, waiting, before, after)


def row(streams: int, waiting: int, before: Snapshot, after: Snapshot) -> str:
    """What happened between two snapshots."""
    seconds = after.at - before.at

    def grown(name: str) -> float:
        return after.since(before, name)

    steps = grown("step_device_seconds_count")
    numbers = [
        f"{100 * grown('step_device_seconds_sum') / seconds:.1f} %",
        f"{1000 * seconds / steps:.1f} ms",
        *(f"{1000 * grown(f'step_{part}_seconds_sum') / steps:.2f} ms" for part in ("plan", "post")),
        f"{grown('generation_tokens_total') / seconds:,.0f}",
    ]
    return f"| {streams} | {waiting or ''} | {' | '.join(numbers)} |"


def main() -> int:
    """Measure all loads and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_busy", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default: %(default)s)")
    seconds: float = parser.parse_args().seconds
    lines = [
        f"| streams | waiting | device busy | a step of {1000 * STEP_SECONDS:.0f} ms took | plan | post | tokens/s |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    [agent_port] = free_ports(1)
    with standin(STEP_SECONDS, LIMITS, agent_port, agent_port) as server:
        server.wait()
        for streams, waiting in LOADS:
            lines.append(asyncio.run(measure(server, streams, waiting, seconds)))
            print(lines[-1], flush=True)
    result_files.write(FOLDER / "busy", {".md": "\n".join(lines) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
