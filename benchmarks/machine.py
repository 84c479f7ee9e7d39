"""The limits of this machine, measured now: ``python -m benchmarks.machine``.

How fast all cores together read memory, which bounds what a token at batch 1 costs, and how fast they multiply float32
matrices, which bounds prefill and large batches.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from kernels import library

READ_BYTES = 1 << 30  # far beyond any cache
MATRIX = 2048  # rows and columns
TRIES = 8


@dataclass(frozen=True)
class Machine:
    """What it is and what it can do at best."""

    cpu: str
    cores: int
    read_gb: float  # GB/s
    gflops: float  # float32
    instructions: str  # that the C++ operators use


def measure() -> Machine:
    """Measure with all physical cores; takes about 3 seconds and 1 GB.

    Raises:
        BuildError: there is no C++ compiler.
    """
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    operators = library.Library(library.build())
    return Machine(
        cpu=cpu_name(),
        cores=cores,
        read_gb=read_speed(cores),
        gflops=multiply_speed(),
        instructions=operators.instructions(),
    )


def read_speed(threads: int) -> float:
    """GB/s at which ``threads`` threads read memory, the best of several tries."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "read.so"
        command = library.compiler()
        if command is None:
            raise library.BuildError(
                "reading memory at full speed needs a C++ compiler (g++, clang++ or what CXX names)"
            )
        source = Path(__file__).parent / "read.cc"
        subprocess.run(
            [command, *library.FLAGS, *library.cpu_flags(), "-shared", str(source), "-o", str(file)], check=True
        )
        read = ctypes.CDLL(str(file)).read_all
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    read.restype = ctypes.c_float
    numbers = np.ones(READ_BYTES // 4, dtype=np.float32)  # written, so that every page is its own
    parts = np.array_split(numbers, threads)

    with ThreadPoolExecutor(threads) as pool:
        return READ_BYTES / best(lambda: list(pool.map(lambda part: read(part.ctypes.data, part.size), parts))) / 1e9


def multiply_speed() -> float:
    """GFLOP/s of numpy's float32 matrix product, on the threads it takes by itself."""
    left, right = np.random.default_rng(0).standard_normal((2, MATRIX, MATRIX), dtype=np.float32)
    return 2 * MATRIX**3 / best(lambda: left @ right) / 1e9


def best(work: Callable[[], object], tries: int = TRIES) -> float:
    """Seconds of the fastest of several tries: whatever else runs on the machine only makes a try slower."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def cpu_name() -> str:
    """What the system calls the CPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def describe(machine: Machine) -> str:
    """One sentence about it."""
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.instructions}: reads {machine.read_gb:.1f} GB/s, "
        f"multiplies float32 at {machine.gflops:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    print(describe(measure()))
