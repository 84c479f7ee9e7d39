"""What several ranks cost on one machine: ``python -m benchmarks.ranks``, with nothing else running.

Ranks on a CPU share its cores and its memory, so they are no faster. What is seen here is that the weights are divided,
and what communication costs: a graph of nothing but a step's sums beside the step.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import psutil

from agent.lifeline import exit_with_launcher
from agent.model_runner import ModelRunner
from agent.placement import physical_cores
from agent.rendezvous import Rendezvous
from benchmarks import machine, rank_processes, result_files
from benchmarks.decode_steps import decode_step, exported, seconds
from benchmarks.rank_processes import RankLost
from benchmarks.report import FOLDER

RANKS = (1, 2, 4)
ROWS = (1, 8, 32)
HIDDEN = 576  # of the default model: the numbers of a token that are summed
CONTEXT = 128  # tokens of each row
CACHE_BYTES = 256 << 20
HEAD = (
    "| ranks | start | rows | step | of it sums | weights of a rank | memory of a rank |\n|--:|--:|--:|--:|--:|--:|--:|"
)


class Measured(msgspec.Struct, frozen=True):
    """What rank 0 saw."""

    ready: float  # seconds since the epoch, when the model was loaded and all ranks had run it
    steps: dict[int, float]  # seconds, by rows
    sums: dict[int, float]  # the same without what is between them; of several ranks
    memory: int  # bytes of its process, cache included


async def measure(folder: Path, ranks: int) -> tuple[float, Measured]:
    """Run all ranks of an exported model, each in a process of its own: the seconds of the start, and the rest.

    Raises:
        RankLost: one of them has ended too early; the others were ended.
    """
    begin = time.time()
    with tempfile.TemporaryDirectory() as logs:
        rendezvous = await Rendezvous.start("the benchmark", ranks, Path(logs) / "rendezvous") if ranks > 1 else None
        processes: list[Process] = []
        try:
            for rank in range(ranks):
                environment = {**os.environ, "GLOG_v": "3", **(rendezvous.environment(rank) if rendezvous else {})}
                processes.append(await start_rank(folder, rank, ranks, environment))
            said = await rank_processes.lines_of(processes)
        finally:  # only now, as a rank that leaves ends the group
            await rank_processes.end(processes)
            if rendezvous:
                rendezvous.kill()
                await rendezvous.ended()
    measured = msgspec.json.decode(said[0], type=Measured)
    return measured.ready - begin, measured


async def start_rank(folder: Path, rank: int, ranks: int, environment: dict[str, str]) -> Process:
    """Start a process that measures, says what it saw, and stays until its standard input closes."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.ranks", "--folder", str(folder), "--rank", str(rank)),
        *("--threads", str(max(1, physical_cores() // ranks))),
        stdin=asyncio.subprocess.PIPE,  # which ``agent.collective`` wants open, as a launcher's is
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )


def run_rank(folder: Path, rank: int, threads: int) -> Measured:
    """Be one rank: time decode steps, then their sums alone."""
    runner = ModelRunner(folder, rank, cache_bytes=CACHE_BYTES, cache_dtype="float16", threads=threads)
    ready = time.time()  # to load a model is to run it: that prefill and decode share a cache is tried
    steps, sums = {}, {}
    for rows in ROWS:
        batch = decode_step(rows, CONTEXT, runner.manifest.block_size)
        steps[rows] = seconds(partial(runner.run, batch, best_only=True))
        if runner.manifest.world_size > 1:
            sums[rows] = seconds(sums_of_a_step(rows, runner.manifest.num_layers))
    return Measured(ready, steps, sums, psutil.Process().memory_info().rss)


def sums_of_a_step(rows: int, layers: int) -> Callable[[], object]:
    """Nothing but the sums of a step: of the embedding, and two for each layer."""
    import mindspore as ms
    from mindspore import Tensor, nn

    from models.collectives import WORLD_GROUP, AllReduce

    class Sums(nn.Cell):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.reduce = AllReduce(WORLD_GROUP["cpu"])

        def construct(self, x: Tensor) -> Tensor:
            for _ in range(2 * layers + 1):
                x = self.reduce(x)
            return x

    x, graph = Tensor(np.zeros((rows, HIDDEN), np.float32)), Sums()
    ms.set_context(mode=ms.GRAPH_MODE)
    return lambda: graph(x).asnumpy()


def lines(folder: Path, ranks: int, start: float, measured: Measured) -> list[str]:
    """The rows of a table in Markdown."""
    weights = folder / ("rank_0/weights.bin" if ranks > 1 else "weights.bin")
    sizes = f"{weights.stat().st_size / 1e6:.0f} MB | {measured.memory / 1e6:.0f} MB"
    found = []
    for rows in ROWS:
        step, sums = measured.steps[rows], measured.sums.get(rows)
        share = "" if sums is None else f"{1e3 * sums:.1f} ms, {100 * sums / step:.0f} %"
        found.append(f"| {ranks} | {start:.0f} s | {rows} | {1e3 * step:.1f} ms | {share} | {sizes} |")
    return found


def main() -> int:
    """Measure and print all, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # with the other two: be one rank
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        exit_with_launcher()
        with os.fdopen(os.dup(1), "wb") as output:
            os.dup2(2, 1)  # MindSpore writes to both
            output.write(msgspec.json.encode(run_rank(arguments.folder, arguments.rank, arguments.threads)) + b"\n")
        signal.pause()  # until the launcher, which is the benchmark, closes standard input
        return 0
    table = [f"{machine.describe(machine.measure())}.", "", HEAD]
    for ranks in RANKS:
        folder = exported("bfloat16", ranks)
        try:
            table += lines(folder, ranks, *asyncio.run(measure(folder, ranks)))
        except RankLost as error:
            print(error, file=sys.stderr)
            return 1
        print("\n".join(table[-len(ROWS) :]), flush=True)
    result_files.write(FOLDER / "ranks", {".md": "\n".join(table) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
