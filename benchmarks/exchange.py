"""Requests and their answers over one connection each, at the least cost for the client.

A client that parses each event as it comes takes a good part of what it measures on few cores, so this one only notes
when which bytes came, and whether they are the last; ``events`` reads them when the answer has ended.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

Piece = tuple[float, bytes]  # of an answer: when it came, and what
ANSWER_SECONDS = 900.0
CONNECT_SECONDS = 30.0
END = b"\r\n0\r\n\r\n"  # the empty chunk that ends a streamed answer
MAX_HEAD_BYTES = 64 << 10

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.I)


class LoadError(RuntimeError):
    """A request was refused, or its answer was not what was asked for."""


class Closed(LoadError):
    """The connection was closed before the first byte of an answer."""


class Exchange(asyncio.Protocol):
    """One connection: sends a request at a time, and notes when which bytes came.

    Attributes:
        open: it can be used, or used again.
    """

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._pieces: list[Piece] = []
        self._ended: asyncio.Future[None] | None = None
        self._status = 0  # until the head is there
        self._left: int | None = None  # bytes of the body; None: it is chunked, or ends with the connection
        self._chunked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True

    async def ask(self, request: bytes, seconds: float = ANSWER_SECONDS) -> tuple[float, list[Piece]]:
        """When the request was sent, and the pieces of its answer with their times.

        Raises:
            LoadError: it was refused, took longer than ``seconds``, or its answer broke off.
        """
        assert self._transport is not None
        ended = self.expect()
        sent = time.perf_counter()
        self._transport.write(request)
        try:
            await asyncio.wait_for(ended, seconds)
        except asyncio.TimeoutError:
            self.close()
            raise LoadError(f"no answer within {seconds:g} seconds") from None
        except BaseException:
            self.close()
            raise
        return sent, self._pieces

    def expect(self) -> asyncio.Future[None]:
        """Begin a new answer; the future is done when it has ended."""
        self._ended, self._pieces = asyncio.get_running_loop().create_future(), []
        self._status, self._left, self._chunked = 0, None, False
        return self._ended

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))
        if not self._status:
            self._read_head()
        elif self._left is not None:
            self._left -= len(data)
        if self._status and self._is_whole(data):
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._status and self._left is None and not self._chunked and exc is None:
            self._finish(None)
        elif self._pieces:
            self._finish(LoadError(f"the answer broke off: {exc or 'the server closed the connection'}"))
        else:
            self._finish(Closed(f"the server closed the connection: {exc or 'no reason given'}"))

    def close(self) -> None:
        """Close the connection, with no farewell that the other side would have to answer, as TLS has one."""
        assert self._transport is not None
        self.open = False
        self._transport.abort()

    def _read_head(self) -> None:
        head, found, body = b"".join(data for _, data in self._pieces).partition(b"\r\n\r\n")
        if not found:
            if len(head) > MAX_HEAD_BYTES:
                self._finish(LoadError(f"an answer with a head of more than {MAX_HEAD_BYTES} bytes"))
            return
        status = _STATUS.match(head)
        if status is None:
            self._finish(LoadError(f"no HTTP/1 answer: {head[:200].decode(errors='replace')}"))
            return
        self._status = int(status[1])
        self._chunked = _CHUNKED.search(head) is not None
        if not self._chunked and (length := _LENGTH.search(head)):
            self._left = int(length[1]) - len(body)

    def _is_whole(self, data: bytes) -> bool:
        if self._left is not None:
            return self._left <= 0
        # The end itself may come in pieces
        end = data if len(data) >= len(END) else b"".join(piece for _, piece in self._pieces[-len(END) :])
        return self._chunked and end.endswith(END)

    def _finish(self, error: LoadError | None) -> None:
        if error is None and self._status != 200:
            text = b"".join(data for _, data in body(self._pieces)).decode(errors="replace")
            error = LoadError(f"status {self._status}: {text.strip()[:500]}")
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


async def connect(url: str, context: ssl.SSLContext | None = None) -> Exchange:
    """Open a connection to the server at ``url``, with TLS if there is a ``context`` for it.

    Raises:
        OSError: there is none.
    """
    host, port = address(urlsplit(url))
    connecting = asyncio.get_running_loop().create_connection(Exchange, host, port, ssl=context)
    try:
        _, exchange = await asyncio.wait_for(connecting, CONNECT_SECONDS)
    except asyncio.TimeoutError:
        raise ConnectionError(f"no connection to {url} within {CONNECT_SECONDS:g} seconds") from None
    except OSError as error:
        raise ConnectionError(f"no connection to {url}: {error}") from error
    return exchange


def address(url: SplitResult) -> tuple[str, int]:
    """Host and port of a URL.

    Raises:
        ValueError: it is none of a server.
    """
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{url.geturl()!r} is not the URL of a server, such as http://127.0.0.1:9811")
    return url.hostname, url.port or (443 if url.scheme == "https" else 80)


def events(pieces: Sequence[Piece]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON events of a 200 answer, each with the time at which its last byte came."""
    rest = b""
    for when, data in body(pieces):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                content = line[len(b"data:") :].strip()
                if content != b"[DONE]":
                    yield when, msgspec.json.decode(content)


def body(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """An answer without its head and the lengths of its chunks."""
    size, rest, chunked, in_head = 0, b"", False, True
    for when, data in pieces:
        rest += data
        if in_head:
            head, found, after = rest.partition(b"\r\n\r\n")
            if not found:
                continue
            chunked, in_head, rest = _CHUNKED.search(head) is not None, False, after
        if not chunked:
            yield when, rest
            rest = b""
        while rest:
            if size == 0:
                line, found, after = rest.removeprefix(b"\r\n").partition(b"\r\n")
                if not found:
                    break
                size, rest = int(line.partition(b";")[0], 16), after
                if size == 0:
                    return
            taken = rest[:size]
            size, rest = size - len(taken), rest[len(taken) :]
            if taken:
                yield when, taken
