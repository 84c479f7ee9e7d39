"""Calls to one server over HTTP, blocking and not: connection, key, certificate, timeouts, retries and errors."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx

from client.answers import Reader
from client.client_errors import ClientError, TimedOut, refusal, transport_error
from client.patience import RETRIES, TIMEOUTS, Retries, Timeouts, Watch
from config.version import __version__

IDLE_SECONDS = 2.0  # an idle connection is kept for less long than servers keep theirs, so none is lost to a race
LOOPBACK = ("127.0.0.1", "::1", "localhost")

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """Where a server is, and how it is to be spoken to.

    Raises:
        ValueError: the URL or the key cannot be used.
        OSError: the certificates cannot be read.
    """

    url: str  # http://127.0.0.1:9811
    token: str | None = field(default=None, repr=False)  # the API key
    ca: str | Path | None = None  # a file of certificates to trust instead of the usual ones
    timeouts: Timeouts = TIMEOUTS
    retries: Retries = RETRIES

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{self.url!r} is not the URL of a server, such as http://127.0.0.1:9811")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("an API key is made of printable ASCII characters")

    def settings(self) -> dict[str, Any]:
        """What httpx is to be told."""
        headers = {"User-Agent": f"mindspore-llm-serving/{__version__}", "Accept-Encoding": "identity"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return {
            "base_url": self.url,
            "headers": headers,
            "verify": True if self.ca is None else ssl.create_default_context(cafile=self.ca),
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
            "trust_env": urlsplit(self.url).hostname not in LOOPBACK,  # no proxy leads to this machine
        }

    def too_late(self, seconds: float | None) -> TimedOut:
        """The error after so many seconds of waiting."""
        return TimedOut(f"{self.url} sent nothing for {seconds} seconds")


class Session:
    """Calls that block. Threads may share it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.Client(**server.settings())

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def call(self, path: str, body: object = None) -> bytes:
        """The answer to ``body`` at ``path``, or what stands there if there is no body.

        Raises:
            ClientError: there is none.
        """
        response = self._send(path, body, self._server.timeouts.answer)
        with contextlib.closing(response), _translated(self._server):
            return response.read()

    def stream(self, path: str, body: object, reader: Reader[T]) -> Generator[T, None, None]:
        """What ``reader`` makes of the answer, as it comes. Closing the generator closes the connection.

        Raises:
            ClientError: the answer is refused, late, or breaks off.
        """
        timeouts = self._server.timeouts
        seconds = timeouts.first_token
        response = self._send(path, body, timeouts.longest_of_stream)
        connection: socket = response.extensions["network_stream"].get_extra_info("socket")
        watch = Watch(lambda: _shut(connection))
        with contextlib.closing(response), contextlib.closing(watch):
            chunks = response.iter_raw()
            while True:
                with _translated(self._server, watch, seconds), watch.limit(seconds):
                    data = next(chunks, None)
                if data is None:
                    return reader.end()
                for found in reader.feed(data):
                    yield found
                    seconds = timeouts.between_tokens

    def _send(self, path: str, body: object, read: float | None) -> httpx.Response:
        """A response of status 200 whose body is still to be read, after as many tries as it takes."""
        tried = 0
        while True:
            try:
                with _translated(self._server):
                    response = self._http.send(_request(self._http, self._server, path, body, read), stream=True)
                    if response.status_code == httpx.codes.OK:
                        return response
                    with contextlib.closing(response):
                        raise refusal(response.status_code, response.headers, response.read())
            except ClientError as error:
                tried += 1
                if (wait := self._server.retries.wait(tried, error)) is None:
                    raise
            time.sleep(wait)


class AsyncSession:
    """The same calls for asyncio."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.AsyncClient(**server.settings())

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def call(self, path: str, body: object = None) -> bytes:
        """As ``Session.call``."""
        response = await self._send(path, body, self._server.timeouts.answer)
        async with contextlib.aclosing(response):
            with _translated(self._server):
                return await response.aread()

    async def stream(self, path: str, body: object, reader: Reader[T]) -> AsyncGenerator[T, None]:
        """As ``Session.stream``."""
        timeouts = self._server.timeouts
        seconds = timeouts.first_token
        response = await self._send(path, body, timeouts.longest_of_stream)
        async with contextlib.aclosing(response):
            chunks = response.aiter_raw()
            while True:
                with _translated(self._server, None, seconds):
                    with anyio.fail_after(seconds):  # asyncio.wait_for before 3.12 can lose a cancellation
                        data = await anext(chunks, None)
                if data is None:
                    reader.end()
                    return
                for found in reader.feed(data):
                    yield found
                    seconds = timeouts.between_tokens

    async def _send(self, path: str, body: object, read: float | None) -> httpx.Response:
        """As ``Session._send``."""
        tried = 0
        while True:
            try:
                with _translated(self._server):
                    response = await self._http.send(_request(self._http, self._server, path, body, read), stream=True)
                    if response.status_code == httpx.codes.OK:
                        return response
                    async with contextlib.aclosing(response):
                        raise refusal(response.status_code, response.headers, await response.aread())
            except ClientError as error:
                tried += 1
                if (wait := self._server.retries.wait(tried, error)) is None:
                    raise
            await asyncio.sleep(wait)


def _request(
    http: httpx.Client | httpx.AsyncClient, server: Server, path: str, body: object, read: float | None
) -> httpx.Request:
    connect = server.timeouts.connect
    timeout = httpx.Timeout(connect=connect, read=read, write=read, pool=connect)
    return http.build_request("GET" if body is None else "POST", path, json=body, timeout=timeout)


@contextlib.contextmanager
def _translated(
    server: Server, watch: Watch | None = None, seconds: float | None = None
) -> Generator[None, None, None]:
    """Errors of httpx and of waiting, as ours."""
    try:
        yield
    except TimeoutError:
        raise server.too_late(seconds) from None
    except httpx.TransportError as error:
        if watch is None or not watch.ran_out:
            raise transport_error(error, server.url) from error
    if watch is not None and watch.ran_out:
        raise server.too_late(seconds)


def _shut(connection: socket) -> None:
    """End a read of ``connection`` that blocks in another thread, under TLS too."""
    with contextlib.suppress(OSError):
        socket.shutdown(connection, SHUT_RDWR)
