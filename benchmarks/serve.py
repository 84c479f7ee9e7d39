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
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from random import Random

from benchmarks import prompts, result_files, serve_report
from benchmarks.arrivals import arrival_times
from benchmarks.exchange import LoadError
from benchmarks.prompts import Prompt
from benchmarks.serve_options import options
from benchmarks.serve_report import Run
from benchmarks.target import Target
from benchmarks.traffic import Outcome, Traffic
from benchmarks.workload import drawn, from_file, lengths
from client.remote_server import Server

PROGRESS_SECONDS = 0.5  # between two looks
USUAL_OUTPUT = "128"  # tokens of an answer, where lengths are drawn
FAILED, CANNOT, INTERRUPTED = 1, 2, 130


def description(arguments: argparse.Namespace) -> str:
    """When requests are sent, in words."""
    if arguments.concurrent:
        return f"{arguments.concurrent} at a time"
    burst = f" of {arguments.burst}" if arguments.arrivals == "bursts" else ""
    return f"{arguments.rate:g} a second, {arguments.arrivals}{burst}"


def work_of(arguments: argparse.Namespace, random: Random) -> list[Prompt]:
    """The requests of a load, drawn anew from what there is as often as needed.

    Raises:
        ValueError: the file holds no prompts.
        OSError: the file cannot be read.
    """
    asked = arguments.output_tokens
    if arguments.input_tokens is not None:
        return drawn(
            arguments.tokenizer, arguments.requests, arguments.input_tokens, asked or lengths(USUAL_OUTPUT), random
        )
    if arguments.file is None:
        found = prompts.first(arguments.requests)
    else:
        entries = from_file(arguments.file, None if asked is None else 1)
        found = [entries[i % len(entries)] for i in range(arguments.requests)]
    return found if asked is None else [Prompt(prompt.text, asked(random)) for prompt in found]


def target_of(arguments: argparse.Namespace) -> Target:
    """The server that is asked.

    Raises:
        ValueError: its URL or the key cannot be used.
        OSError: the certificates cannot be read.
    """
    url = arguments.url.rstrip("/").removesuffix("/v1")
    Server(url, arguments.api_key)  # which says what is wrong with either
    return Target(
        arguments.protocol,
        url,
        arguments.model,
        token=arguments.api_key,
        ca=arguments.ca,
        ignore_eos=not arguments.end_tokens,
        extra=arguments.extra,
    )


async def measure(target: Target, work: Sequence[Prompt], arguments: argparse.Namespace, random: Random) -> Run:
    """Send ``work`` and see what comes, until all has ended or Ctrl-C ends it.

    Raises:
        LoadError: not even the requests before the load are answered.
        KeyboardInterrupt: Ctrl-C, before the load.
    """
    before = [work[i % len(work)] for i in range(arguments.warm_up)]
    before = [Prompt(prompt.text, min(prompt.new_tokens, 4)) for prompt in before]
    for outcome in await Traffic(target, arguments.timeout).closed_loop(before, 1):
        if outcome.error is not None:
            raise LoadError(outcome.error)
    traffic = Traffic(target, arguments.timeout)
    made = target.tokens_made()
    # Nothing that lives now will be thrown away during the load, so nobody needs to look for it
    gc.collect()
    gc.freeze()
    begin, cpu = time.perf_counter(), time.process_time()
    if arguments.concurrent:
        sending = traffic.closed_loop(work, arguments.concurrent)
    else:
        times = arrival_times(arguments.arrivals, arguments.rate, len(work), burst=arguments.burst, random=random)
        sending = traffic.open_loop(work, times)
    load = asyncio.create_task(sending)
    with progress(traffic, len(work)), ended_by_ctrl_c(load):
        await asyncio.wait({load})
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if not load.cancelled():
        load.result()  # raises what nobody foresaw
    return Run(
        outcomes=sorted(traffic.outcomes, key=lambda outcome: outcome.due),
        begin=begin,
        seconds=seconds,
        client_cpu=cpu / seconds,
        most=traffic.most,
        made=made_since(made, target),
        planned=len(work),
        cut_off=traffic.cut_off,
    )


def made_since(before: int | None, target: Target) -> int | None:
    """The tokens that the server has made since it had made ``before``; None if it does not say, or is gone."""
    try:
        after = target.tokens_made()
    except LoadError as error:
        print(f"tokens are not confirmed: {error}", file=sys.stderr)
        return None
    return None if before is None or after is None else after - before


@contextlib.contextmanager
def ended_by_ctrl_c(load: asyncio.Task[list[Outcome]]) -> Iterator[None]:
    """The first Ctrl-C cancels ``load``, so that what there is can be reported; another one ends this process."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        yield
        return
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        load.cancel()

    loop.add_signal_handler(signal.SIGINT, cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


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
    """Measure, print and write the results.

    1 if requests failed, 2 if nothing could be measured, 130 after Ctrl-C, with a report of what there was until then.
    """
    arguments = options((__doc__ or "").splitlines()[0])
    random = Random(arguments.seed)
    try:
        target = target_of(arguments)
        work = work_of(arguments, random)
        result_files.check(arguments.output, serve_report.ENDINGS)
        run = asyncio.run(measure(target, work, arguments, random))
        report, values = serve_report.report_of(
            run, target, arguments.tokenizer, load=description(arguments), seed=arguments.seed, limits=arguments.slo
        )
        print(serve_report.table(report), flush=True)
        for path in serve_report.write(report, values, arguments.output):
            print(f"wrote {path}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped before there was anything to report", file=sys.stderr)
        return INTERRUPTED
    except (LoadError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return CANNOT
    if report.stopped:
        return INTERRUPTED
    return FAILED if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
