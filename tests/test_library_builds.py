"""The C++ operators' tests once more, on libraries that are built otherwise.

One watches its memory accesses and its arithmetic; one keeps to the instructions that every CPU has.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import library

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
TESTS = Path(__file__).parent
FILES = ("test_native_operators.py", "test_packed_weights.py", "test_paged_attention.py", "test_decoder_layer.py")
PYTEST = ("-m", "pytest", "-x", "--capture=sys", "-p", "no:cacheprovider", *(str(TESTS / name) for name in FILES))
BEYOND = """
import numpy as np
from native_call import NativeLibrary
x = np.ones((2, 64), dtype=np.float32)
longer = np.lib.stride_tricks.as_strided(x, ({tokens}, 64))
norm, weight = np.append(np.ones(64), 0).astype(np.float32), np.ones((4, 64), dtype=np.float32)
print(NativeLibrary().call("NormLinear", [longer, norm, weight], ({tokens}, 4)).sum())
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


def sanitized(*arguments: str, examples: int = 1) -> subprocess.CompletedProcess[str]:
    """Run Python on a sanitized library."""
    environment = {
        "LD_PRELOAD": " ".join(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return otherwise(FLAGS, *arguments, examples=examples, **environment)


@needs_sanitizer
def test_reading_beyond_a_buffer_is_seen() -> None:
    fine = sanitized("-c", BEYOND.format(tokens=2))
    assert (fine.returncode, fine.stdout) == (0, "512.0\n"), fine.stderr[-3000:]
    beyond = sanitized("-c", BEYOND.format(tokens=3))
    assert beyond.returncode != 0
    assert "heap-buffer-overflow" in beyond.stderr


@needs_sanitizer
def test_operators_stay_within_their_buffers() -> None:
    assert_passed(sanitized(*PYTEST, examples=100))


@needs_x86
def test_operators_do_without_the_instructions_of_newer_cpus() -> None:
    assert_passed(otherwise("-march=x86-64", *PYTEST, examples=30))


def assert_passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
