"""A closed-loop load on one server: so many requests at a time, each followed by the next one when it has ended.

``python -m benchmarks.load ours http://127.0.0.1:9811 -c 8`` prints one line of JSON. Every server is asked for the
same prompts and the same numbers of greedy tokens, end tokens ignored, and must really have made them: its usage event
or its counter says how many. The client only notes times and bytes while a request runs and reads them when all have
ended: on few cores, a client that parses each event takes a good part of what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from benchmarks import prompts
from benchmarks.prompts import Prompt

Kind = Literal["ours", "openai"]
Piece = tuple[float, bytes]  # of an answer: when it came, and what
ANSWER_SECONDS = 900.0
END = b"\r\n0\r\n\r\n"  # the empty chunk that ends a streamed answer


class LoadError(RuntimeError):
    """A request was refused, or its answer was not what was asked for."""


@dataclass(frozen=True)
class Target:
    """A server and a model of it."""

    kind: Kind
    url: str
    model: str

    def request(self, prompt: Prompt) -> bytes:
        """The HTTP request that streams the answer to ``prompt``."""
        path, content = self._content(prompt)
        body = json.dumps(content).encode()
        head = (
            f"POST {path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join((*head, "", "")).encode() + body

    def tokens_made(self) -> int | None:
        """How many tokens the server has made since its start; None if its answers say how many they hold."""
        if self.kind == "openai":
            return None
        text = httpx.get(f"{self.url}/metrics", trust_env=False).raise_for_status().text
        return sum(int(float(value)) for value in re.findall(r"^\w+_generation_tokens_total{.*} (\S+)$", text, re.M))

    def _content(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        if self.kind == "openai":
            return "/v1/completions", {
                "model": self.model,
                "prompt": prompt.text,
                "max_tokens": prompt.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        parameters = {"max_new_tokens": prompt.new_tokens, "ignore_eos": True, "return_full_text": False}
        return f"/models/{self.model}/generate_stream", {"inputs": prompt.text, "parameters": parameters}


@dataclass(frozen=True)
class Answer:
    """One answer; times in seconds."""

    tokens: int
    sent: float  # when the request was
    arrivals: tuple[float, ...]  # when each event with text in it came

    @property
    def first(self) -> float:
        """From the request to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def per_token(self) -> float:
        """Between two tokens after the first, on average."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one event and the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


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


class Exchange(asyncio.Protocol):
    """One connection: sends a request at a time, and notes when which bytes came."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._pieces: list[Piece] = []
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: bytes) -> tuple[float, list[Piece]]:
        """When the request was sent, and the pieces of its answer with their times."""
        assert self._transport is not None
        ended = self.expect()
        sent = time.perf_counter()
        self._transport.write(request)
        await asyncio.wait_for(ended, ANSWER_SECONDS)
        return sent, self._pieces

    def expect(self) -> asyncio.Future[None]:
        """Begin a new answer; the future is done when it has ended."""
        self._ended, self._pieces = asyncio.get_running_loop().create_future(), []
        return self._ended

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))
        # The end itself may come in pieces
        refused = len(self._pieces) == 1 and not data.startswith(b"HTTP/1.1 200")
        end = data if len(data) >= len(END) else b"".join(piece for _, piece in self._pieces[-len(END) :])
        if refused:
            self._finish(LoadError(data.decode(errors="replace")))
        elif end.endswith(END):
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(LoadError(f"the server closed the connection: {exc or 'no reason given'}"))

    def close(self) -> None:
        """Close the connection."""
        assert self._transport is not None
        self._transport.close()

    def _finish(self, error: LoadError | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


async def measure(target: Target, work: Sequence[Prompt], concurrent: int) -> Load:
    """Send ``work``, ``concurrent`` requests at a time, and count what comes.

    Raises:
        LoadError: a request was refused, or was answered with other than the tokens it asked for.
        OSError: there is no server.
    """
    waiting = iter([(prompt, target.request(prompt)) for prompt in work])
    raw: list[tuple[Prompt, float, list[Piece]]] = []
    before = target.tokens_made()
    connections = await connect(target.url, min(concurrent, len(work)))

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


async def connect(url: str, count: int) -> list[Exchange]:
    """Open ``count`` connections."""
    host, _, port = urlsplit(url).netloc.rpartition(":")
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(Exchange, host, int(port)))[1] for _ in range(count)]


def answer_of(kind: Kind, prompt: Prompt, sent: float, pieces: Sequence[Piece]) -> Answer:
    """Read what came for one prompt.

    Raises:
        LoadError: an error came, or a report of other than the tokens that were asked for.
    """
    arrivals: list[float] = []
    reported = prompt.new_tokens
    for when, event in events(pieces):
        if event.get("event") == "error" or "error" in event:
            raise LoadError(str(event))
        if kind == "openai":
            reported = (event.get("usage") or {}).get("completion_tokens", reported)
            text = event["choices"][0]["text"] if event["choices"] else ""
        else:
            text = event["data"]
        if text:
            arrivals.append(when)
    if reported != prompt.new_tokens:
        raise LoadError(f"{reported} tokens instead of {prompt.new_tokens}")
    # An answer may be nothing but tokens without text; then its end is the first that its client sees
    return Answer(reported, sent, tuple(arrivals) or (pieces[-1][0],))


def events(pieces: Sequence[Piece]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON events of a chunked HTTP answer, each with the time at which its last byte came."""
    size, body, head = 0, bytearray(), True  # of the running chunk: bytes that are still to come
    rest = b""
    for when, data in pieces:
        rest += data
        if head:
            if b"\r\n\r\n" not in rest:
                continue
            rest, head = rest.split(b"\r\n\r\n", 1)[1], False
        while rest:
            if size == 0:
                line, found, after = rest.removeprefix(b"\r\n").partition(b"\r\n")
                if not found:
                    break
                size, rest = int(line, 16), after
                if size == 0:
                    break
            taken = rest[:size]
            body += taken
            size, rest = size - len(taken), rest[len(taken) :]
        *lines, last = bytes(body).split(b"\n")
        body = bytearray(last)
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and content != b"[DONE]":
                yield when, json.loads(content)


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


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all ``values`` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    """Measure once and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("ours", "openai"), help="how requests are written")
    parser.add_argument("url", help="such as http://127.0.0.1:9811")
    parser.add_argument("-c", "--concurrent", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("-n", "--requests", type=int, default=64, help="in all (default: %(default)s)")
    parser.add_argument("--model", default="llama2", help="the name under which it is served (default: %(default)s)")
    arguments = parser.parse_args()
    target = Target(arguments.kind, arguments.url, arguments.model)
    work = prompts.first(arguments.requests)
    print(json.dumps(asdict(asyncio.run(measure(target, work, arguments.concurrent)))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
