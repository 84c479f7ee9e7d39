"""Thousands of requests in seconds: the server's own scheduler, on a device that is a few numbers in a file.

``python -m benchmarks.simulate --sweep max_num_batched_tokens=256,1024 --rate 2,4`` prints a line for each of the four
cases. The same seed gives the same figures, and all cases the same requests. ``docs/scheduling.md`` has what was
learned with it. What is not simulated: HTTP and tokenizing, the limits on the queue (all requests wait as long as they
must), and devices that fail.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

from benchmarks import device, simulate_report, trace
from benchmarks.arrivals import PATTERNS, arrival_times
from benchmarks.device import Device
from benchmarks.options import count, option, positive
from benchmarks.replay import DISPATCHES, Dispatch, Limits, replay
from benchmarks.simulate_report import Cell, Settings, cell_of
from benchmarks.trace import Job, Shape
from benchmarks.workload import lengths
from config.serving_config import LimitsConfig

BURST = 32  # requests of a burst, unless it is said


def switch(text: str) -> bool:
    """``true`` or ``false``."""
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


def dispatch(text: str) -> Dispatch:
    """How requests find a group."""
    for known in DISPATCHES:
        if text == known:
            return known
    raise ValueError(f"{text!r} is none of {', '.join(DISPATCHES)}")


SWEPT: dict[str, Callable[[str], int | bool | str]] = {
    "max_num_seqs": count,
    "max_num_batched_tokens": count,
    "chunks": switch,
    "mixed": switch,
    "prefix_caching": switch,
    "spare_blocks": count,
    "cached_tokens": count,
    "data_parallel": count,
    "dispatch": dispatch,
    "max_new_tokens": count,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=(__doc__ or "").splitlines()[0])
    top.add_argument(
        "--device",
        type=option(device.load),
        default="llama2_7b_910b4",
        help=f"a preset ({', '.join(device.presets())}) or a file (default: %(default)s)",
    )
    top.add_argument(
        "--sweep",
        type=option(sweep),
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help=f"limits to try, each with all others: {', '.join(SWEPT)}; one value sets it",
    )
    when = top.add_argument_group("when requests arrive")
    when.add_argument("--rate", type=option(rates), help="requests a second, several to try each (default: 4)")
    when.add_argument(
        "--arrivals",
        choices=PATTERNS,
        default="poisson",
        help="; ".join(f"{name}: {text}" for name, text in PATTERNS.items()) + " (default: %(default)s)",
    )
    when.add_argument("--burst", type=option(count), help=f"requests of one of the bursts (default: {BURST})")
    when.add_argument("-n", "--requests", type=option(count), default=2000, help="in all (default: %(default)s)")
    when.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")

    asked = top.add_argument_group("what is asked")
    asked.add_argument(
        "--file",
        type=Path,
        help="JSON lines with prompt_tokens, output_tokens; arrival, priority, prefix, prefix_tokens",
    )
    asked.add_argument(
        "--input-tokens",
        type=option(lengths),
        default="lognormal:256:1",
        help="128, uniform:16:256 or lognormal:128:0.7 (default: %(default)s)",
    )
    asked.add_argument(
        "--output-tokens", type=option(lengths), default="lognormal:128:0.8", help="the same (default: %(default)s)"
    )
    asked.add_argument("--prefix-tokens", type=option(count), default=0, help="at the begin of each prompt")
    asked.add_argument("--prefixes", type=option(count), help="different ones (default: 1)")
    asked.add_argument(
        "--priorities", type=option(priorities), default=[0], help="to draw from, such as --priorities=-1,0,0,0"
    )
    top.add_argument(
        "--output", type=Path, default=simulate_report.OUTPUT, help="without its ending (default: %(default)s)"
    )
    return top


def sweep(text: str) -> tuple[str, list[int | bool | str]]:
    """``max_num_seqs=32,64`` as name and values."""
    name, _, values = text.partition("=")
    if name not in SWEPT:
        raise ValueError(f"{name!r} is none of {', '.join(SWEPT)}")
    try:
        return name, [SWEPT[name](value) for value in values.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def rates(text: str) -> list[float]:
    """``2,4,8``."""
    return [positive(part) for part in text.split(",")]


def priorities(text: str) -> list[int]:
    """``-1,0``."""
    return [int(part) for part in text.split(",")]


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    """The requests of all cases, the file's in turns.

    Raises:
        ValueError: the options contradict each other, or the file holds something else.
        OSError: the file cannot be read.
    """
    if arguments.burst is not None and arguments.arrivals != "bursts":
        raise ValueError(f"--burst {arguments.burst} is of --arrivals bursts, not of --arrivals {arguments.arrivals}")
    if arguments.prefixes is not None and not arguments.prefix_tokens:
        raise ValueError(
            f"--prefixes {arguments.prefixes} are of so many tokens as --prefix-tokens says, which is not given"
        )
    if arguments.file is None:
        return trace.drawn(
            arguments.requests,
            arguments.input_tokens,
            arguments.output_tokens,
            longest=arguments.device.context_length,
            prefixes=arguments.prefixes or 1,
            prefix_tokens=arguments.prefix_tokens,
            priorities=arguments.priorities,
            random=Random(arguments.seed),
        )
    shapes = trace.from_file(arguments.file)
    if shapes[0].arrival is None:
        return [shapes[i % len(shapes)] for i in range(arguments.requests)]
    if arguments.rate is not None:
        raise ValueError(f"{arguments.file} says when its requests arrive; leave --rate out")
    return shapes


def jobs_at(rate: float | None, shapes: Sequence[Shape], arguments: argparse.Namespace) -> list[Job]:
    """``shapes`` with their arrivals, in order; a rate of None: those of the file."""
    if rate is None:
        return sorted((Job(shape.arrival or 0.0, shape) for shape in shapes), key=lambda job: job.arrival)
    random = Random(arguments.seed)
    times = arrival_times(arguments.arrivals, rate, len(shapes), burst=arguments.burst or BURST, random=random)
    return [Job(*one) for one in zip(times, shapes, strict=True)]


def run(
    where: Device, settings: Settings, rate: float | None, jobs: Sequence[Job]
) -> tuple[Cell, dict[str, list[float]]]:
    """One case."""
    usual = LimitsConfig()
    limits = Limits(
        max_num_seqs=usual.max_num_seqs,
        max_num_batched_tokens=usual.max_num_batched_tokens,
        prefix_caching=usual.prefix_caching,
    )
    return cell_of(*replay(jobs, where, replace(limits, **settings)), settings, rate)


def title_of(arguments: argparse.Namespace, requests: int) -> str:
    """What is simulated, in words."""
    source = arguments.file.name if arguments.file else arguments.arrivals
    return f"{arguments.device.name}, {requests} requests, {source}"


def main(words: Sequence[str] | None = None) -> int:
    """Simulate all cases, print and write the results; 2 if something is wrong with the options."""
    arguments = parser().parse_args(words)
    begin, cells = time.perf_counter(), []
    values: dict[str, list[float]] = {}
    try:
        shapes = shapes_of(arguments)
        own = arguments.file is not None and shapes[0].arrival is not None
        names = [name for name, _ in arguments.sweep]
        for rate in [None] if own else arguments.rate or [4.0]:
            jobs = jobs_at(rate, shapes, arguments)
            for choice in product(*(tried for _, tried in arguments.sweep)):
                cell, values = run(arguments.device, dict(zip(names, choice, strict=True)), rate, jobs)
                cells.append(cell)
        title = title_of(arguments, len(shapes))
        print(f"{title}; times in milliseconds\n\n{simulate_report.table(cells)}")
        if found := simulate_report.priorities(cells):
            print(f"\n{found}")
        for path in simulate_report.write(title, cells, values, arguments.output):
            print(f"wrote {path}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(cells)} cases in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
