"""A closed-loop load on one server: so many requests at a time, each followed by the next one when it has ended.

``python -m benchmarks.load ours http://127.0.0.1:9811 -c 8`` prints one line of JSON. Every server is asked for the
same prompts and the same numbers of greedy tokens, end tokens ignored, and must really have made them: its usage event
or its counter says how many. Answers are read when all have ended. Other loads than this are for ``benchmarks.serve``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks import prompts
from benchmarks.exchange import Exchange, LoadError, Piece
from benchmarks.latency import Answer, percentile
from benchmarks.options import count, option
from benchmarks.prompts import Prompt
from benchmarks.target import KINDS, Kind, Target, read


@dataclass(frozen=True)
class Load:
    """What was measured of one load; times in milliseconds."""

    concurrent: int
    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_p50: float  # to the first token (TTFT)
    first_p99: float
    token_p50: float  # a token after the first (TPOT)
    token_p99: float
    gap_p50: float  # between events (ITL)
    gap_p99: float
    client_cpu: float  # share of one core that the client took


async def measure(target: Target, work: Sequence[Prompt], concurrent: int) -> Load:
    """Send ``work``, ``concurrent`` requests at a time, and count what comes.

    Raises:
        LoadError: a request was refused, or was answered with other than the tokens it asked for.
        OSError: there is no server.
    """
    waiting = iter([(prompt, target.request(prompt)) for prompt in work])
    raw: list[tuple[Prompt, float, list[Piece]]] = []
    before = target.tokens_made()
    connections = [await target.connect() for _ in range(min(concurrent, len(work)))]

    async def one_after_the_other(connection: Exchange) -> None:
        for prompt, request in waiting:
            raw.append((prompt, *await connection.ask(request)))

    begin, cpu = time.perf_counter(), time.process_time()
    try:
        await asyncio.gather(*(one_after_the_other(connection) for connection in connections))
    finally:
        for connection in connections:
            connection.close()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    answers = [answer_of(target.kind, *one) for one in raw]
    asked, after = sum(prompt.new_tokens for prompt in work), target.tokens_made()
    if before is not None and after is not None and after - before != asked:
        raise LoadError(f"{after - before} tokens instead of {asked}")
    return summary(answers, concurrent, seconds, cpu / seconds)


def answer_of(kind: Kind, prompt: Prompt, sent: float, pieces: Sequence[Piece]) -> Answer:
    """Read what came for one prompt.

    Raises:
        LoadError: an error came, or a report of other than the tokens that were asked for.
    """
    found = read(kind, pieces)
    if found.tokens not in (None, prompt.new_tokens):
        raise LoadError(f"{found.tokens} tokens instead of {prompt.new_tokens}")
    return Answer(prompt.new_tokens, sent, found.arrivals)


def summary(answers: Sequence[Answer], concurrent: int, seconds: float, client_cpu: float) -> Load:
    """All answers of a load together."""
    first = [1e3 * answer.first for answer in answers]
    token = [1e3 * answer.per_token for answer in answers if answer.tokens > 1] or [0.0]
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps] or [0.0]
    tokens = sum(answer.tokens for answer in answers)
    return Load(
        concurrent=concurrent,
        requests=len(answers),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_p50=percentile(first, 0.5),
        first_p99=percentile(first, 0.99),
        token_p50=percentile(token, 0.5),
        token_p99=percentile(token, 0.99),
        gap_p50=percentile(gaps, 0.5),
        gap_p99=percentile(gaps, 0.99),
        client_cpu=client_cpu,
    )


def main() -> int:
    """Measure once and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS, help="how requests are written")
    parser.add_argument("url", help="such as http://127.0.0.1:9811")
    parser.add_argument(
        "-c", "--concurrent", type=option(count), default=8, help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("-n", "--requests", type=option(count), default=64, help="in all (default: %(default)s)")
    parser.add_argument("--model", default="llama2", help="the name under which it is served (default: %(default)s)")
    arguments = parser.parse_args()
    target = Target(arguments.kind, arguments.url, arguments.model)
    work = prompts.first(arguments.requests)
    try:
        print(json.dumps(asdict(asyncio.run(measure(target, work, arguments.concurrent)))))
    except (LoadError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
