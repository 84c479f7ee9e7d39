"""Calls to one server over HTTP, blocking and not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Generator, Mapping
from socket import SHUT_RDWR, socket
from typing import Any, TypeVar
from weakref import WeakSet

import anyio
import httpx

from client.answers import Reader
from client.client_errors import ClientError
from client.http_call import Call
from client.patience import Watch
from client.remote_server import Server

T = TypeVar("T")
Body = Mapping[str, object]


class Session:
    """Calls that block. Threads may share it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.Client(**server.settings())
        self._closed = threading.Event()
        self._sockets: WeakSet[socket] = WeakSet()
        self._sockets_lock = threading.Lock()

    def close(self) -> None:
        """Close all connections, also those from which another thread is reading."""
        self._closed.set()
        with self._sockets_lock:
            sockets = list(self._sockets)
        for one in sockets:
            _shut(one)
        self._http.close()

    def call(self, path: str, body: Body | None = None) -> bytes:
        """The answer to ``body`` at ``path``, or what stands there if there is no body.

        Raises:
            ClientError: there is none.
        """
        call = Call(self._server, path, body, "answer")
        with contextlib.closing(self._send(call)) as response, call.errors(self._closed):
            return response.read()

    def stream(self, path: str, body: Body, reader: Reader[T]) -> Generator[T, None, None]:
        """What ``reader`` makes of the answer, as it comes. Closing the generator closes the connection.

        Raises:
            ClientError: the answer is refused, late, or breaks off.
        """
        call = Call(self._server, path, body, "first_token")
        response = self._send(call)
        connection: socket = response.extensions["network_stream"].get_extra_info("socket")
        watch = Watch(lambda: _shut(connection))
        with contextlib.closing(response), contextlib.closing(watch):
            call.time_the_body(response)
            chunks = response.iter_raw()
            while True:
                with call.errors(self._closed, watch), watch.limit(call.left()):
                    data = next(chunks, None)
                if data is None:
                    return reader.end()
                if found := reader.feed(data):
                    yield from found
                    call.goes_on()

    def _send(self, call: Call) -> httpx.Response:
        """A response of status 200 whose body is still to be read, after as many tries as it takes."""
        while True:
            try:
                with call.errors(self._closed):
                    response = self._http.send(call.request(self._http, self._note), stream=True)
                    if response.status_code != httpx.codes.OK:
                        with contextlib.closing(response):
                            response.read()
                    call.accept(response)
                    return response
            except ClientError as error:
                self._closed.wait(call.pause(error))

    def _note(self, event: str, found: Mapping[str, Any]) -> None:
        """Remember each new socket: that another thread closes it does not wake the one that reads from it."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._sockets_lock:
                self._sockets.add(found["return_value"].get_extra_info("socket"))


class AsyncSession:
    """The same calls for asyncio."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.AsyncClient(**server.settings())
        self._closed = threading.Event()

    async def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        await self._http.aclose()

    async def call(self, path: str, body: Body | None = None) -> bytes:
        """As ``Session.call``."""
        call = Call(self._server, path, body, "answer")
        async with contextlib.aclosing(await self._send(call)) as response:
            with call.errors(self._closed):
                return await response.aread()

    async def stream(self, path: str, body: Body, reader: Reader[T]) -> AsyncGenerator[T, None]:
        """As ``Session.stream``."""
        call = Call(self._server, path, body, "first_token")
        async with contextlib.aclosing(await self._send(call)) as response:
            call.time_the_body(response)
            chunks = response.aiter_raw()
            while True:
                with call.errors(self._closed):
                    with anyio.fail_after(call.left()):  # asyncio.wait_for before 3.12 can lose a cancellation
                        data = await anext(chunks, None)
                if data is None:
                    reader.end()
                    return
                if found := reader.feed(data):
                    for one in found:
                        yield one
                    call.goes_on()

    async def _send(self, call: Call) -> httpx.Response:
        """As ``Session._send``."""
        while True:
            try:
                with call.errors(self._closed):
                    response = await self._http.send(call.request(self._http), stream=True)
                    if response.status_code != httpx.codes.OK:
                        async with contextlib.aclosing(response):
                            await response.aread()
                    call.accept(response)
                    return response
            except ClientError as error:
                wait = call.pause(error)
            await asyncio.sleep(wait)


def _shut(connection: socket) -> None:
    """End a read of ``connection`` that blocks in another thread, under TLS too."""
    with contextlib.suppress(OSError):
        socket.shutdown(connection, SHUT_RDWR)
