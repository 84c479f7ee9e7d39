"""How long a decode step of the model alone takes: ``python -m benchmarks.decode_steps``, with nothing else running.

The default model in every format of its weights, without agent and server, beside the time in which this machine reads
what the step must read: all weights once, and each row's cached keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from agent.model_runner import ModelRunner
from agent.placement import physical_cores
from agent.step_batch import StepBatch
from benchmarks import machine, result_files
from benchmarks.report import FOLDER
from benchmarks.weights import step_bytes
from config.serving_config import WeightFormat
from models import export

FORMATS: tuple[WeightFormat, ...] = ("gguf", "int8", "bfloat16", "float32")
CASES = ((1, 100), (1, 1000), (1, 2000), (1, 4000), (8, 100), (8, 1000), (32, 100))  # rows, tokens of each
CACHE_DTYPE, CACHE_BYTES = "float16", 512 << 20
STEPS, WARM_STEPS = 60, 5
HEAD = (
    "| weights | rows | tokens of each | step | must read | at memory's speed | the step's time |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def exported(weights: WeightFormat, ranks: int = 1) -> Path:
    """The folder of the default model in this format for so many ranks, exported unless it is there."""
    name = (
        export.DEFAULT_FOLDER.name + (f"-{weights}" if weights != "gguf" else "") + (f"-tp{ranks}" if ranks > 1 else "")
    )
    options = export.ExportOptions(operators="native", weights=weights, ranks=ranks)
    export.export(export.default_checkpoint(), folder := export.MODELS_FOLDER / name, options)
    return folder


def decode_step(rows: int, context: int, block_size: int) -> StepBatch:
    """One new token for each of ``rows`` rows, which have ``context`` tokens with it."""
    width = -(-context // block_size)
    tables = np.arange(1, 1 + rows * width, dtype=np.int32).reshape(rows, width)
    last = np.full(rows, context - 1, np.int32)
    return StepBatch(
        token_ids=np.arange(100, 100 + rows, dtype=np.int32),
        positions=last,
        slot_mapping=tables[:, -1] * block_size + last % block_size,
        block_tables=tables,
        query_lens=np.ones(rows, np.int32),
        context_lens=last + 1,
        logits_indices=np.arange(rows, dtype=np.int32),
    )


def seconds(call: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(WARM_STEPS + STEPS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_STEPS:])


def lines(weights: WeightFormat) -> Iterator[str]:
    """The rows of one format, in Markdown. Memory is measured anew for each: its speed changes on a shared machine."""
    folder = exported(weights)
    speed = machine.read_speed(physical_cores()) * 1e9
    runner = ModelRunner(folder, cache_bytes=CACHE_BYTES, cache_dtype=CACHE_DTYPE, threads=None)
    token_bytes = runner.manifest.cache_block_bytes(CACHE_DTYPE) // runner.manifest.block_size
    for rows, context in CASES:
        batch = decode_step(rows, context, runner.manifest.block_size)
        took = seconds(partial(runner.run, batch, best_only=True))
        read = step_bytes(folder) + rows * context * token_bytes
        cells = (weights, rows, f"{context:,}", f"{1e3 * took:.1f} ms", f"{read / 1e6:.0f} MB")
        floor = read / speed
        yield f"| {' | '.join(map(str, cells))} | {1e3 * floor:.1f} ms | {took / floor:.2f} x |"


def main() -> int:
    """Measure and print all, and write the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.decode_steps", description=__doc__.splitlines()[0]).parse_args()
    table = [f"{machine.describe(machine.measure())}.", "", HEAD]
    print("\n".join(table))
    for weights in FORMATS:
        for line in lines(weights):
            print(line, flush=True)
            table.append(line)
    result_files.write(FOLDER / "steps", {".md": "\n".join(table) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
