"""The numbers in the README: ``python -m benchmarks.measure`` starts the default deployment, measures, prints a table.

Nothing else should run on the machine. Requests are closed loop: as many at a time as the row says, each with a prompt
of ``prompts.txt`` and 64 greedy tokens whatever they are, so that every run generates the same amount.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from config.serving_config import load

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
NEW_TOKENS = 64
CONCURRENT = (1, 8, 32)


async def main() -> int:
    """Measure and print; 1 if anything did not work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config/smollm2_cpu.yaml", help="the deployment (default: %(default)s)")
    arguments = parser.parse_args()
    server = load(arguments.config).server
    print(f"{psutil.cpu_count()} CPUs, {cpu_name()}, Python {platform.python_version()}\n")
    print("| measured | |\n|---|---|")
    print(f"| first export of the default model | {first_export():.0f} s |")
    begin = time.perf_counter()
    with deployment(arguments.config) as process:
        async with httpx.AsyncClient(base_url=f"http://{server.host}:{server.port}", timeout=600) as client:
            await first_answer(client, process)
            print(f"| start to first answer, once set up | {time.perf_counter() - begin:.1f} s |")
            print(f"| memory of the agent after start | {agent_bytes(process) / 2**30:.2f} GiB |")
            for concurrent in CONCURRENT:
                speed, first = await load_of(client, concurrent)
                print(f"| {concurrent} at a time | {speed:.0f} tokens/s, first token after {first * 1e3:.0f} ms |")
            print(f"| memory of the agent afterwards | {agent_bytes(process) / 2**30:.2f} GiB |")
    return 0


def first_export() -> float:
    """Seconds of an export to an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "models.export", "--output", f"{folder}/model"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - begin


@contextlib.contextmanager
def deployment(config: str) -> Iterator[subprocess.Popen[bytes]]:
    """``start.py`` and all that belongs to it."""
    command = [sys.executable, "start.py", "--config", config]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


async def first_answer(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    """Ask until there is an answer.

    Raises:
        RuntimeError: the deployment ended.
    """
    while process.poll() is None:
        with contextlib.suppress(httpx.ConnectError):
            response = await client.post(
                "/models/llama2", json={"inputs": "Hello", "parameters": {"max_new_tokens": 1}}
            )
            if response.status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the deployment ended with {process.returncode}")


async def load_of(client: httpx.AsyncClient, concurrent: int) -> tuple[float, float]:
    """Tokens a second of ``concurrent`` clients, and the median time to a first token, in seconds."""
    waiting = iter(PROMPTS * (2 if concurrent > 8 else 1) if concurrent > 1 else PROMPTS[:8])
    firsts: list[float] = []

    async def one_after_the_other() -> None:
        for prompt in waiting:
            firsts.append(await ask(client, prompt))

    begin = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(concurrent)))
    seconds = time.perf_counter() - begin
    return len(firsts) * NEW_TOKENS / seconds, sorted(firsts)[len(firsts) // 2]


async def ask(client: httpx.AsyncClient, prompt: str) -> float:
    """One streamed answer: seconds to its first event.

    Raises:
        httpx.HTTPStatusError: it was refused.
        RuntimeError: it came with fewer tokens than were asked for.
    """
    parameters = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "details": True, "return_full_text": False}
    body = {"inputs": prompt, "parameters": parameters | {"return_protocol": "lines"}}
    begin, first, last = time.perf_counter(), None, ""
    async with client.stream("POST", "/models/llama2/generate_stream", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            first = first or time.perf_counter() - begin
            last = line
    if first is None or f'"generated_tokens": {NEW_TOKENS}' not in last:
        raise RuntimeError(f"not {NEW_TOKENS} tokens: {last}")
    return first


def agent_bytes(process: subprocess.Popen[bytes]) -> int:
    """Resident memory of the agent process, the largest child."""
    sizes: list[int] = [child.memory_info().rss for child in psutil.Process(process.pid).children(recursive=True)]
    return max(sizes)


def cpu_name() -> str:
    """What the system calls the CPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
