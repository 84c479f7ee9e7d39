"""What streams cost the app: ``python -m benchmarks.streaming_cost``.

The stand-in model takes 50 ms a step; app, agent and load client are processes of this machine, as with any model. A
relay between agent and app notes when each step's tokens reach the app, and the load client when each event reaches it,
with the same clock. So a delay is the app's and, as nobody can look at the wire itself, the client's until it reads;
events that came together count with what they waited for each other.
"""

from __future__ import annotations

import argparse
import asyncio
from bisect import bisect_right
from collections.abc import Sequence

import httpx

from benchmarks import result_files
from benchmarks.latency import Spread, spread
from benchmarks.prompts import Prompt
from benchmarks.relay import Relay
from benchmarks.report import FOLDER
from benchmarks.servers import Server
from benchmarks.standin import Snapshot, once, standin
from benchmarks.target import KINDS, Kind, Target
from benchmarks.traffic import Traffic
from config.free_ports import free_ports

STEP_SECONDS = 0.05  # far more than any delay, so that each event is known to belong to the latest step
PROTOCOLS: tuple[Kind, ...] = ("ours", "openai", "chat")  # Text Generation Inference cannot go on past end tokens
MANY, FEW = 128, 16  # streams: for the cost of a step, and for the delay of a token
FIRST_EVENTS = 20  # of each stream, whose neighbours are still being accepted
LIMITS = {"max_num_seqs": MANY}


async def measure(server: Server, relay: Relay, kind: Kind, seconds: float) -> str:
    """One row of the table."""
    target = Target(kind, server.target.url, server.target.model)
    cost = await step_cost(server, target, seconds)
    delay = await token_delay(target, relay, seconds)
    path = KINDS[kind].rpartition(" ")[2]
    numbers = [*(f"{1000 * part:.1f} ms" for part in cost), f"{1000 * delay.p50:.1f} ms", f"{1000 * delay.p99:.1f} ms"]
    return f"| `{path}` | {' | '.join(numbers)} |"


async def step_cost(server: Server, target: Target, seconds: float) -> tuple[float, float]:
    """Seconds of one core that a step of many streams takes of the app: all of it, and without planning the step."""
    work = [Prompt(f"stream {number}", 10 * round(seconds / STEP_SECONDS)) for number in range(MANY)]
    async with httpx.AsyncClient(base_url=target.url, trust_env=False, timeout=60) as client:
        traffic = asyncio.create_task(Traffic(target, 600).closed_loop(work, MANY))
        try:
            before, cpu = await once(client, num_requests_running=MANY), -server.cpu_seconds()
            await asyncio.sleep(seconds)
            cpu += server.cpu_seconds()
            after = await Snapshot.take(client)
        finally:
            traffic.cancel()
            await asyncio.gather(traffic, return_exceptions=True)
        await once(client, num_requests_running=0)
    steps = after.since(before, "step_device_seconds_count")
    return cpu / steps, (cpu - after.since(before, "step_plan_seconds_sum")) / steps


async def token_delay(target: Target, relay: Relay, seconds: float) -> Spread:
    """Seconds from a step's answer to each event that it brings a client, of a few streams at a time."""
    tokens = FIRST_EVENTS + round(seconds / STEP_SECONDS)
    outcomes = await Traffic(target, 600).closed_loop([Prompt(f"stream {i}", tokens) for i in range(FEW)], FEW)
    if failed := [outcome.error for outcome in outcomes if outcome.reading is None]:
        raise RuntimeError(f"{len(failed)} streams failed: {failed[0]}")
    arrivals = [outcome.reading.arrivals[FIRST_EVENTS:] for outcome in outcomes if outcome.reading]
    found = spread([delay for events in arrivals for delay in delays(relay.answers, events)])
    assert found is not None, "there are events"
    return found


def delays(answers: Sequence[float], events: Sequence[float]) -> list[float]:
    """From the latest of ``answers`` to each of ``events``; both are times in order."""
    return [event - answers[bisect_right(answers, event) - 1] for event in events]


async def run(seconds: float) -> list[str]:
    """The rows of all protocols."""
    agent_port, relay_port = free_ports(2)
    relay = Relay(agent_port)
    lines = []
    async with relay.listen(relay_port):
        with standin(STEP_SECONDS, LIMITS, agent_port, relay_port) as server:
            await asyncio.to_thread(server.wait)
            for kind in PROTOCOLS:
                lines.append(await measure(server, relay, kind, seconds))
                print(lines[-1], flush=True)
    return lines


def main() -> int:
    """Measure all protocols and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: %(default)s)")
    seconds: float = parser.parse_args().seconds
    head = [
        f"| streams of | {MANY}: the app's CPU a step | without planning it | {FEW}: a token's delay, p50 | p99 |",
        "|---|--:|--:|--:|--:|",
    ]
    print("\n".join(head), flush=True)
    lines = [*head, *asyncio.run(run(seconds))]
    result_files.write(FOLDER / "streaming", {".md": "\n".join(lines) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
