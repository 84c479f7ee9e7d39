"""The C++ operators as a shared library: built once on the machine that runs them, found again by its sources.

``python -m kernels.library`` builds it and says where it is. Without a C++ compiler there is no library, and models
run on MindSpore's standard operators.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
FOLDER = SOURCES.parent / "output" / "kernels"
FLAGS = (
    "-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wall", "-Wextra",
    "-fPIC",
)  # fmt: skip


class Tiles(IntEnum):
    """Whether the operators use the CPU's unit for products of tiles (AMX), and why not; as in ``tile.h``."""

    ABSENT = 0
    REFUSED = 1
    WRONG = 2
    OFF = 3
    USED = 4


TILES = {
    Tiles.ABSENT: "this CPU has no AMX",
    Tiles.REFUSED: "the system does not grant AMX to this process; products of many tokens take longer without it",
    Tiles.WRONG: "AMX gives wrong products here and is not used; please report this CPU",
    Tiles.OFF: "AMX is turned off",
    Tiles.USED: "AMX multiplies 16 tokens and more",
}


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says which and what it printed."""


def compiler() -> str | None:
    """The C++ compiler: what ``CXX`` names, else the first one found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@cache
def compiler_version(command: str | None) -> str:
    """What a compiler says of itself: after an upgrade it is another one, in the same place."""
    if command is None:
        return ""
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return f"{command} {said.stdout}"


def extra_flags() -> tuple[str, ...]:
    """What ``CXXFLAGS`` adds; a library built with other flags is another library."""
    return tuple(shlex.split(os.environ.get("CXXFLAGS", "")))


def cpu_flags() -> tuple[str, ...]:
    """Let the compiler use this machine's instructions: the library never leaves it."""
    return ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)


def path() -> Path:
    """Where the library of these sources, this compiler and this CPU belongs, built or not."""
    parts = (compiler_version(compiler()), *FLAGS, *cpu_flags(), *extra_flags(), cpu_name())
    digest = hashlib.sha256(" ".join(parts).encode())
    for source in sources():
        digest.update(source.read_bytes())
    return FOLDER / f"libnative-{digest.hexdigest()[:16]}.so"


def sources() -> list[Path]:
    """Everything the library is made of."""
    return sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])


def cpu_name() -> str:
    """What tells this CPU's instructions from another's: a library built for one may not run on the other."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def build() -> Path:
    """Build the library unless it is there; half-built ones are never seen.

    Raises:
        BuildError: no compiler, or its error.
    """
    target = path()
    if target.exists():
        return target
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler found (g++, clang++ or what CXX names)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = {source: Path(scratch) / f"{source.stem}.o" for source in sources() if source.suffix == ".cc"}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: run(command, "-c", source, "-o", objects[source]), objects))
        output = Path(scratch) / target.name
        run(command, "-shared", *objects.values(), "-o", output)
        output.replace(target)
    return target


def run(command: str, *arguments: str | Path) -> None:
    """The compiler once, with everybody's flags.

    Raises:
        BuildError: with what it printed.
    """
    flags = (*FLAGS, *cpu_flags(), *extra_flags())
    done = subprocess.run([command, *flags, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command} failed; GCC 11, GCC 12 and clang 14 are known to do\n{done.stderr.strip()}")


class Library:
    """The loaded library's own functions."""

    def __init__(self, file: Path) -> None:
        """Load the library that ``build`` made."""
        self.file = file
        self._handle = ctypes.CDLL(str(file))
        for function in (self._handle.native_last_error, self._handle.native_instructions):
            function.restype = ctypes.c_char_p

    def set_threads(self, threads: int) -> None:
        """Threads of every operator from now on.

        Raises:
            OSError: the system does not give as many.
        """
        if self._handle.native_set_threads(ctypes.c_int(threads)):
            raise OSError(f"{threads} threads: {self.last_error()}")

    def tiles(self) -> Tiles:
        """Whether products of many tokens use AMX."""
        return Tiles(self._handle.native_tiles())

    def use_tiles(self, on: bool) -> None:
        """Let them, where they can, or not."""
        self._handle.native_use_tiles(ctypes.c_int(on))

    def instructions(self) -> str:
        """What it was compiled for: ``AVX-512 VNNI BF16``, ``AVX2``, ``NEON dot products`` …"""
        name: bytes = self._handle.native_instructions()
        return name.decode()

    def last_error(self) -> str:
        """Why the last operator failed; empty if it did not."""
        text: bytes = self._handle.native_last_error()
        return text.decode(errors="replace")


def main() -> int:
    """Build and report; 0 also where that fails, since everything runs without them."""
    try:
        built = Library(build())
        print(f"C++ operators: {built.file}, {built.instructions()}; {TILES[built.tiles()]}")  # noqa: T201
    except BuildError as error:
        print(f"C++ operators: not built: {error}", file=sys.stderr)  # noqa: T201
        loss = "models will run on MindSpore's standard operators, which are ten to twenty times slower"
        print(loss, file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
