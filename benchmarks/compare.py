"""``make bench``: this server, and beside it what a user could pick instead, under the same load in one run.

``python -m benchmarks.compare --peers DIR`` measures against vLLM and llama.cpp as well, which ``peers.sh setup DIR``
puts there. Servers take turns at each number of concurrent requests, and the next round goes the other way around, so
that what else happens on the machine hits all of them alike. Who is not measured is paused. Results go to
``output/bench``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType

from tokenizers import Tokenizer

from benchmarks import machine, prompts, report, servers
from benchmarks.exchange import LoadError
from benchmarks.load import Load, measure
from benchmarks.report import Comparison, Measured
from benchmarks.servers import Server
from benchmarks.weights import step_bytes
from config.serving_config import ConfigError, load

REQUESTS = {1: 8, 8: 32, 32: 96, 64: 128}  # by how many run at a time
RAW = (1, 8, 32)  # sequences of llama.cpp
LONG_TOKENS, LONG_REQUESTS = 1000, 3
WARM_TOKENS = 4


@dataclass
class Series:
    """All that was measured of one server, round by round."""

    server: Server
    loads: dict[int, list[Load]] = field(default_factory=lambda: {concurrent: [] for concurrent in REQUESTS})
    long: list[float] = field(default_factory=list)  # milliseconds to the first token of a long prompt


@dataclass
class Run:
    """One comparison under way."""

    tokenizer: Tokenizer
    series: list[Series]
    peers: Path | None
    raw: dict[int, list[float]] = field(default_factory=lambda: {sequences: [] for sequences in RAW})
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def round(self, backwards: bool) -> None:
        """Measure everything once, the servers taking turns."""
        steps: list[Callable[[], None]] = []
        for concurrent in REQUESTS:
            for series in self.series:
                steps.append(partial(self._load, series, concurrent))
            if self.peers and concurrent in RAW:
                steps.append(partial(self._raw, concurrent))
        steps += [partial(self._long, series) for series in self.series]
        for step in reversed(steps) if backwards else steps:
            step()

    def _load(self, series: Series, concurrent: int) -> None:
        with self._alone(series):
            warm = [prompts.Prompt(prompt.text, WARM_TOKENS) for prompt in prompts.first(concurrent)]
            asyncio.run(measure(series.server.target, warm, concurrent))
            found = asyncio.run(measure(series.server.target, prompts.first(REQUESTS[concurrent]), concurrent))
        series.loads[concurrent].append(found)
        say(
            f"{series.server.name}, {concurrent} at a time: {found.tokens_per_second:.1f} tokens/s, first token after "
            f"{found.first_p50:.0f} ms, {found.token_p50:.1f} ms a token"
        )

    def _long(self, series: Series) -> None:
        start = 100 + 100 * next(self._numbers)  # numbers of the same length, none of them twice
        work = prompts.long_prompts(self.tokenizer, LONG_REQUESTS, tokens=LONG_TOKENS, new_tokens=2, start=start)
        with self._alone(series):
            asyncio.run(measure(series.server.target, prompts.first(1), 1))
            found = asyncio.run(measure(series.server.target, work, 1))
        series.long.append(found.first_p50)
        say(f"{series.server.name}, a prompt of {LONG_TOKENS} tokens: first token after {found.first_p50:.0f} ms")

    def _raw(self, sequences: int) -> None:
        assert self.peers is not None
        with self._alone(None):
            found = servers.llamacpp(self.peers, sequences)
        self.raw[sequences].append(found)
        say(f"llama.cpp without a server, {sequences} at a time: {found:.1f} tokens/s")

    @contextlib.contextmanager
    def _alone(self, running: Series | None) -> Iterator[None]:
        """Pause all servers but one."""
        with contextlib.ExitStack() as pauses:
            for other in self.series:
                if other is not running:
                    pauses.enter_context(other.server.paused())
            if running is not None:
                running.server.wait()  # after a long pause it looks whether its parts are still there
            yield


def compare(config_path: str, peers: Path | None, rounds: int) -> Comparison:
    """Start the servers, measure, stop them.

    Raises:
        ConfigError: the configuration cannot be read.
        LoadError, RuntimeError: a server does not do what was asked of it.
    """
    config = load(config_path)
    folder = Path(config.models[0].path)
    limits = machine.measure()
    say(machine.describe(limits))
    with contextlib.ExitStack() as running:
        begin = time.perf_counter()
        series = [Series(start(running, servers.ours(config_path, config)))]
        ready = time.perf_counter() - begin
        say(f"ours serves after {ready:.1f} s")
        if peers:
            with series[0].server.paused():
                series.append(Series(start(running, servers.vllm(peers))))
            say("vllm serves")
        run = Run(Tokenizer.from_file(str(folder / "tokenizer.json")), series, peers)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            run.round(backwards=number % 2 == 1)
        sizes = {"ours": step_bytes(folder), "vllm": bfloat16_bytes(peers) if peers else 0}
        return Comparison(
            machine=limits,
            model=folder.name,
            rounds=rounds,
            start_seconds=ready,
            servers=[
                Measured(
                    name=one.server.name,
                    weight_bytes=sizes[one.server.name],
                    memory_bytes=one.server.memory(),
                    loads=[median(loads) for loads in one.loads.values()],
                    long_ms=statistics.median(one.long),
                )
                for one in series
            ],
            llamacpp={number: statistics.median(speeds) for number, speeds in run.raw.items() if speeds},
        )


def start(running: contextlib.ExitStack, server: Server) -> Server:
    """Wait for a server, and stop it with the others."""
    running.callback(server.stop)
    server.wait()
    return server


def median(loads: Sequence[Load]) -> Load:
    """The median over the rounds of each number that is measured; what is counted is the same in all."""
    measured = [name for name, value in asdict(loads[0]).items() if isinstance(value, float)]
    return replace(loads[0], **{name: statistics.median(getattr(one, name) for one in loads) for name in measured})


def bfloat16_bytes(peers: Path) -> int:
    """Bytes of the weights that vLLM reads at each step; the default model's head is its embedding."""
    return sum(file.stat().st_size for file in (peers / "hf").glob("*.safetensors"))


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM does what Ctrl-C does: the servers are stopped on the way out."""
    raise KeyboardInterrupt


def main() -> int:
    """Compare and write the results; 1 if a server failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config/smollm2_cpu.yaml", help="the deployment (default: %(default)s)")
    parser.add_argument("--peers", type=Path, help="the folder that peers.sh set up; without it only ours is measured")
    parser.add_argument("--rounds", type=int, default=2, help="over all loads (default: %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)
    try:
        comparison = compare(arguments.config, arguments.peers, arguments.rounds)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, LoadError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report.table(comparison))
    for path in report.write(comparison):
        say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
