"""The C++ operators' tests once more, on libraries that are built otherwise.

One watches its memory accesses and its arithmetic, one keeps to the instructions that every CPU has, and one multiplies
by tiles in ordinary arithmetic: what AMX does, as far as a CPU without it can tell.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import library

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
TESTS = Path(__file__).parent
OPERATORS = ("native_operators", "packed_weights", "paged_attention", "decoder_layer")
PYTEST = ("-m", "pytest", "-x", "--capture=sys", "-p", "no:cacheprovider")
ALL = tuple(str(TESTS / f"test_{name}.py") for name in OPERATORS)
PACKED = str(TESTS / "test_packed_weights.py")  # what tiles multiply
EMULATED = "-DNATIVE_EMULATED_TILES"
BEYOND = """
import numpy as np
from native_call import NativeLibrary
x = np.ones((2, 64), dtype=np.float32)
longer = np.lib.stride_tricks.as_strided(x, ({tokens}, 64))
norm, weight = np.append(np.ones(64), 0).astype(np.float32), np.ones((4, 64), dtype=np.float32)
print(NativeLibrary().call("NormLinear", [longer, norm, weight], ({tokens}, 4)).sum())
"""

TILES = """
import sys
import numpy as np
from native_call import NativeLibrary
from operator_reference import normal
from test_packed_weights import KINDS, packed
from kernels.library import Tiles
native = NativeLibrary()
if native.own.tiles() != Tiles.USED:
    sys.exit("no tiles")
for kind in KINDS:
    for tokens, rows, columns in ((15, 16, 32), (16, 70, 96), (40, 64, 160), (97, 576, 576), (193, 48, 1536)):
        norm = np.append(normal(1, columns), 1e-5).astype(np.float32)
        arguments = [normal(2, tokens, columns), norm, packed(kind, normal(3, rows, columns))[0]]
        results = []
        for on in (True, False):
            native.own.use_tiles(on)
            results.append(native.call("NormLinear", arguments, (tokens, rows)))
        equal, near = np.array_equal(*results), np.allclose(*results, rtol=1e-4, atol=1e-3)
        print(kind.name, tokens, "equal" if equal else "near" if near else "different")
"""


def runtime() -> list[str]:
    """The sanitizer's library and the one whose exceptions it watches, which must be in a process before all others.

    Nothing if the compiler does not have them.
    """
    command = library.compiler()
    if command is None:
        return []
    files = []
    for name in ("libasan.so", "libstdc++.so.6"):
        named = subprocess.run([command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        files.append(Path(named.stdout.strip()))
    return (
        [str(file.resolve()) for file in files] if all(file.is_absolute() and file.exists() for file in files) else []
    )


pytestmark = pytest.mark.slow  # they build the library once more
needs_sanitizer = pytest.mark.skipif(not runtime(), reason="no C++ compiler with GCC's address sanitizer")
needs_x86 = pytest.mark.skipif(
    library.compiler() is None or platform.machine() != "x86_64", reason="no C++ compiler for x86"
)
needs_avx2 = pytest.mark.skipif(
    library.compiler() is None or " avx2 " not in library.cpu_name(), reason="tiles are emulated on CPUs with AVX2"
)


def otherwise(flags: str, *arguments: str, examples: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a library that is built with ``flags``."""
    environment = {
        **os.environ,
        "CXXFLAGS": flags,
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
        "OPERATOR_EXAMPLES": str(examples),
        **more,
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def sanitized(*arguments: str, flags: str = FLAGS, examples: int = 1) -> subprocess.CompletedProcess[str]:
    """Run Python on a sanitized library."""
    environment = {
        "LD_PRELOAD": " ".join(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return otherwise(flags, *arguments, examples=examples, **environment)


@needs_sanitizer
def test_reading_beyond_a_buffer_is_seen() -> None:
    fine = sanitized("-c", BEYOND.format(tokens=2))
    assert (fine.returncode, fine.stdout) == (0, "512.0\n"), fine.stderr[-3000:]
    beyond = sanitized("-c", BEYOND.format(tokens=3))
    assert beyond.returncode != 0
    assert "heap-buffer-overflow" in beyond.stderr


@needs_sanitizer
def test_operators_stay_within_their_buffers() -> None:
    assert_passed(sanitized(*PYTEST, *ALL, examples=60))


@needs_x86
def test_operators_do_without_the_instructions_of_newer_cpus() -> None:
    assert_passed(otherwise("-march=x86-64", *PYTEST, *ALL, examples=30))


@needs_avx2
def test_tiles_multiply_as_everything_else_does() -> None:
    done = otherwise(EMULATED, "-c", TILES)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 20
    assert all(line.endswith(("equal", "near") if line.startswith("BF16") else "equal") for line in lines), done.stdout
    assert_passed(otherwise(EMULATED, *PYTEST, PACKED, examples=30))


@needs_sanitizer
@needs_avx2
def test_tiles_stay_within_their_buffers() -> None:
    assert_passed(sanitized(*PYTEST, PACKED, flags=f"{FLAGS} {EMULATED}", examples=10))


@needs_x86
def test_operators_are_built_for_a_cpu_with_tiles(tmp_path: Path) -> None:
    """Nothing here can run them."""
    assembly = tmp_path / "linear.s"
    library.run(str(library.compiler()), "-march=sapphirerapids", "-S", library.SOURCES / "linear.cc", "-o", assembly)
    text = assembly.read_text()
    assert all(name in text for name in ("ldtilecfg", "tdpbsud", "tdpbf16ps", "tilerelease"))


def assert_passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
