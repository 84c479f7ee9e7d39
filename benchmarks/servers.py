"""The servers that are compared, each as a user starts it, in processes that a benchmark owns."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from benchmarks.target import Target
from config.free_ports import free_ports
from config.serving_config import ServingConfig

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 600.0  # vLLM compiles its graphs when it starts
STOP_SECONDS, PATIENCE_SECONDS = 40.0, 5.0
PR_SET_PDEATHSIG = 1  # prctl(2): send me a signal when my parent dies

_libc = ctypes.CDLL(None)


class Server:
    """One server: all of its processes, and where it answers."""

    def __init__(self, name: str, target: Target, command: list[str], health: str) -> None:
        """Start it, with its output in ``output/bench/NAME.log``; the path ``health`` says 200 once it serves."""
        self.name, self.target = name, target
        self._health = f"{target.url}{health}"
        self.log = ROOT / "output" / "bench" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C is for the benchmark, which stops its servers
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
            )

    def wait(self) -> None:
        """Return once it serves.

        Raises:
            RuntimeError: it ended, or did not serve in time.
        """
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self._health, trust_env=False).status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} does not serve; see {self.log}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let none of its processes run for a while: what another server is measured with is the whole machine."""
        processes = self._tree()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def memory(self) -> int:
        """Bytes of all its processes; what several share is counted once."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total

    def cpu_seconds(self) -> float:
        """What its first process has taken of the CPU so far, of all cores together."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        """End it, with force if it does not go; nothing of it is left."""
        processes = self._tree()
        left = processes
        for seconds in (PATIENCE_SECONDS, STOP_SECONDS):  # a second signal says that no answer is waited for
            if left:
                self._process.terminate()
                _, left = psutil.wait_procs(left, seconds)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        """Its processes, the first one first."""
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def end_with_parent() -> None:
    """In a child: end when the benchmark does, however that ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def ours(config_path: str, config: ServingConfig) -> Server:
    """This project's deployment with its app and agents; its first model is the one that is measured.

    Raises:
        RuntimeError: its port is taken.
    """
    url = f"http://{config.server.host}:{config.server.port}"
    with socket.socket() as taken:
        if taken.connect_ex((config.server.host, config.server.port)) == 0:
            raise RuntimeError(f"{url}: somebody serves there already; stop it, or measure another configuration")
    command = [sys.executable, "start.py", "--config", config_path]
    return Server("ours", Target("ours", url, config.models[0].names[0]), command, "/health/ready")


def vllm(peers: Path) -> Server:
    """vLLM's OpenAI server from the folder that ``peers.sh`` set up, on the same weights in bfloat16."""
    [port] = free_ports(1)
    command = [str(ROOT / "benchmarks" / "peers.sh"), "vllm", str(peers), str(port)]
    return Server("vllm", Target("openai", f"http://127.0.0.1:{port}", "smol"), command, "/health")


def llamacpp(peers: Path, sequences: int) -> float:
    """Tokens a second of llama.cpp's own decode of ``sequences`` sequences, without any server.

    Raises:
        RuntimeError: it failed.
    """
    script = ROOT / "benchmarks" / "peers.sh"
    done = subprocess.run(
        [str(script), "llamacpp", str(peers), str(sequences)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])
