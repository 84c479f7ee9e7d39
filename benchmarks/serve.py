"""A load on any server, and how it was answered: ``python -m benchmarks.serve --rate 4 http://127.0.0.1:9811``.

With ``--rate``, the loop is open: when each request arrives is fixed before the first one is sent, and its latency
counts from then, however busy server or client are; by how much the client itself was late is reported. With
``--concurrent`` the loop is closed: so many requests at a time. Tokens are those that the server says it made, in its
usage report, its token events or its counter; where it says nothing, ``--tokenizer`` counts the texts, or events count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tokenizers import Tokenizer

from benchmarks import prompts, serve_report
from benchmarks.arrivals import PATTERNS, arrival_times
from benchmarks.exchange import ANSWER_SECONDS, LoadError
from benchmarks.latency import LIMITS, limits_of
from benchmarks.prompts import Prompt
from benchmarks.serve_report import Run
from benchmarks.target import KINDS, Target
from benchmarks.traffic import Traffic
from benchmarks.workload import drawn, from_file, lengths
from client.command_line import KEY

PROGRESS_SECONDS = 0.5  # between two looks
USUAL_OUTPUT = "128"  # tokens of an answer, where lengths are drawn

T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    top.add_argument("url", help="such as http://127.0.0.1:9811")
    kinds = "; ".join(f"{kind}: {words}" for kind, words in KINDS.items())
    top.add_argument("--protocol", choices=KINDS, default="ours", help=f"{kinds} (default: %(default)s)")
    top.add_argument("--model", default="llama2", help="the name under which it is served (default: %(default)s)")
    top.add_argument("--api-key", default=os.environ.get(KEY), help=f"better in ${KEY}: others see command lines")
    top.add_argument("--ca", metavar="FILE", help="certificates to trust instead of the usual ones")
    top.add_argument("--extra", type=option(fields), default={}, metavar="JSON", help="more fields of each request")
    top.add_argument("--end-tokens", action="store_true", help="let answers end where the model ends them")

    loop = top.add_argument_group("when requests are sent").add_mutually_exclusive_group(required=True)
    loop.add_argument("--rate", type=option(positive), help="open loop: requests a second")
    loop.add_argument("-c", "--concurrent", type=option(count), help="closed loop: requests at a time")
    top.add_argument("--arrivals", choices=PATTERNS, default="poisson", help="of an open loop (default: %(default)s)")
    top.add_argument("--burst", type=option(count), default=8, help="requests of a burst (default: %(default)s)")
    top.add_argument("-n", "--requests", type=option(count), default=64, help="in all (default: %(default)s)")
    top.add_argument(
        "--warm-up", type=option(whole), default=2, help="requests before, not counted (default: %(default)s)"
    )
    top.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    top.add_argument(
        "--timeout", type=option(positive), default=ANSWER_SECONDS, help="seconds for an answer (%(default)g)"
    )

    asked = top.add_argument_group("what is asked (default: the project's short prompts)")
    asked.add_argument("--file", type=Path, help="JSON or JSON lines: objects with prompt and output_tokens")
    asked.add_argument(
        "--input-tokens", type=option(lengths), help="128, uniform:16:256 or lognormal:128:0.7; needs --tokenizer"
    )
    asked.add_argument("--output-tokens", type=option(lengths), help="the same; replaces the lengths of the prompts")
    asked.add_argument("--tokenizer", type=option(tokenizer_file), metavar="FILE", help="the model's tokenizer.json")

    top.add_argument(
        "--slo",
        type=option(limits_of),
        default={},
        help=f"limits in milliseconds of {', '.join(LIMITS)}: ttft:500,tpot:50",
    )
    top.add_argument(
        "--output", type=Path, default=serve_report.OUTPUT, help="without its ending (default: %(default)s)"
    )
    return top


def option(read: Callable[[str], T]) -> Callable[[str], T]:
    """``read`` for argparse, which shows only its own errors' messages."""

    def read_option(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_option


def positive(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return number


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    if (number := int(text)) < 0:
        raise ValueError(f"{text} is below 0")
    return number


def count(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise ValueError(f"{text} is not above 0")
    return number


def fields(text: str) -> dict[str, Any]:
    """A JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("this is no JSON object")
    return found


def tokenizer_file(text: str) -> Tokenizer:
    """A tokenizer.json."""
    try:
        return Tokenizer.from_str(json.dumps(json.loads(Path(text).read_bytes())))
    except OSError as error:
        raise ValueError(str(error)) from None


def description(arguments: argparse.Namespace) -> str:
    """When requests are sent, in words."""
    if arguments.concurrent:
        return f"{arguments.concurrent} at a time"
    burst = f" of {arguments.burst}" if arguments.arrivals == "bursts" else ""
    return f"{arguments.rate:g} a second, {arguments.arrivals}{burst}"


def work_of(arguments: argparse.Namespace, random: Random) -> list[Prompt]:
    """The requests of a load, drawn anew from what there is as often as needed.

    Raises:
        ValueError: the options contradict each other, or the file holds no prompts.
        OSError: the file cannot be read.
    """
    asked = arguments.output_tokens
    if arguments.input_tokens is not None:
        if arguments.tokenizer is None or arguments.file is not None:
            raise ValueError("--input-tokens needs --tokenizer, and no --file")
        return drawn(
            arguments.tokenizer, arguments.requests, arguments.input_tokens, asked or lengths(USUAL_OUTPUT), random
        )
    if arguments.file is None:
        found = prompts.first(arguments.requests)
    else:
        entries = from_file(arguments.file, None if asked is None else 1)
        found = [entries[i % len(entries)] for i in range(arguments.requests)]
    return found if asked is None else [Prompt(prompt.text, asked(random)) for prompt in found]


async def measure(target: Target, work: Sequence[Prompt], arguments: argparse.Namespace, random: Random) -> Run:
    """Send ``work`` and see what comes.

    Raises:
        LoadError: not even the requests before the load are answered.
        OSError: there is no server.
    """
    before = [Prompt(prompt.text, min(prompt.new_tokens, 4)) for prompt in work[: arguments.warm_up]]
    for outcome in await Traffic(target, arguments.timeout).closed_loop(before, 1):
        if outcome.error is not None:
            raise LoadError(outcome.error)
    traffic = Traffic(target, arguments.timeout)
    made = target.tokens_made()
    # Nothing that lives now will be thrown away during the load, so nobody needs to look for it
    gc.collect()
    gc.freeze()
    begin, cpu = time.perf_counter(), time.process_time()
    with progress(traffic, len(work)):
        if arguments.concurrent:
            outcomes = await traffic.closed_loop(work, arguments.concurrent)
        else:
            times = arrival_times(arguments.arrivals, arguments.rate, len(work), burst=arguments.burst, random=random)
            outcomes = await traffic.open_loop(work, times)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    after = target.tokens_made()
    made_here = None if made is None or after is None else after - made
    return Run(outcomes, begin, seconds, cpu / seconds, traffic.most, made_here)


@contextlib.contextmanager
def progress(traffic: Traffic, total: int) -> Iterator[None]:
    """A line at the terminal, if there is one, that says how far the load is."""
    if not sys.stderr.isatty():
        yield
        return

    async def show() -> None:
        begin = time.monotonic()
        while True:
            seconds = time.monotonic() - begin
            bar = "#" * (30 * traffic.done // total)
            state = f"{traffic.done}/{total}, {traffic.running} running, {traffic.failed} failed, {seconds:.0f} s"
            print(f"\r[{bar:30}] {state}\x1b[K", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(PROGRESS_SECONDS)

    showing = asyncio.get_running_loop().create_task(show())
    try:
        yield
    finally:
        showing.cancel()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print and write the results; 1 if requests failed, 2 if nothing could be measured, 130 after Ctrl-C."""
    arguments = parser().parse_args()
    random = Random(arguments.seed)
    target = Target(
        arguments.protocol,
        arguments.url.rstrip("/").removesuffix("/v1"),
        arguments.model,
        token=arguments.api_key,
        ca=arguments.ca,
        ignore_eos=not arguments.end_tokens,
        extra=arguments.extra,
    )
    try:
        work = work_of(arguments, random)
        run = asyncio.run(measure(target, work, arguments, random))
        report, values = serve_report.report_of(
            run, target, arguments.tokenizer, load=description(arguments), seed=arguments.seed, limits=arguments.slo
        )
        print(serve_report.table(report))
        for path in serve_report.write(report, values, arguments.output):
            print(f"wrote {path}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except (LoadError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
