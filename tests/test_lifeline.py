"""A process that ends when its launcher is gone, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
import sys

# Leaves when it is asked to, by way of native code that takes for ever and lets no thread of Python run
LINGERS = """
import atexit, ctypes, signal, sys
from agent import lifeline
lifeline.EXIT_SECONDS = 0.2
atexit.register(ctypes.PyDLL(None).sleep, 600)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
lifeline.exit_with_launcher()
print("here", flush=True)
signal.pause()
"""


def test_native_code_that_never_returns_does_not_keep_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", LINGERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == b"here\n"
            process.stdin.close()
            assert process.wait(30) == -signal.SIGALRM
        finally:
            process.kill()
