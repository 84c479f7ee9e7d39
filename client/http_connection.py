"""One client's connection: uvicorn's HTTP/1.1, with errors in our words and an end to waiting."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from client.routes.problem import Problem
from config.serving_config import ServingConfig

MAX_HEADER_BYTES = 16 << 10  # request line and headers together
SPARE_CONNECTIONS = 64  # beyond limits.max_connections: they are told so, or asked for health; more are just closed
OTHER_FILES = 128  # of this process, beside the connections
SURPLUS = "surplus"  # in ``scope["state"]``: the connection is beyond limits.max_connections

logger = logging.getLogger(__name__)


class HttpConnection(H11Protocol):
    """A connection that must bring whole requests in time.

    The time runs from the connection's begin, later from a request's first byte, until headers and body are there.
    """

    max_connections: int
    receive_seconds: float

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        surplus = len(self.connections) - self.max_connections
        if surplus > SPARE_CONNECTIONS:
            transport.abort()
        elif surplus > 0:
            self.app_state = {**self.app_state, SURPLUS: True}
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request."""
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._answer(headers_too_large() if hint == 431 else Problem(status=400, message="this is not an HTTP request"))

    def _watch(self) -> None:
        """Keep a deadline as long as the client owes us the rest of a request."""
        state = self.conn.their_state
        begun = self.scope is None or bool(self.conn.trailing_data[0])  # the first one begins with the connection
        if not (state is h11.SEND_BODY or (state is h11.IDLE and begun)):
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.receive_seconds, self._too_slow)

    def _unwatch(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        address = "{}:{}".format(*self.client) if self.client else "a client"
        logger.info("%s has not sent a whole request within %g s", address, self.receive_seconds)
        in_body = self.conn.their_state is h11.SEND_BODY
        if in_body:
            self.cycle.disconnected = True  # the route that waits for the body is told that the client has left
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            message = f"the request was not complete within {self.receive_seconds:g} s"
            self._answer(Problem(status=408, message=message), self.scope["path"] if in_body else "")
        else:  # it has been answered already, without its body
            self.transport.close()

    def _answer(self, problem: Problem, path: str = "") -> None:
        """Answer and close. Without a path nobody knows whose client this is."""
        response = problem.response(path)
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=response.status_code, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def connections_of(config: ServingConfig) -> type[HttpConnection]:
    """The connections of one app, with its limits."""

    class Connection(HttpConnection):
        max_connections = config.limits.max_connections
        receive_seconds = config.server.receive_timeout_seconds

    return Connection


def allow_files(max_connections: int) -> None:
    """Raise the number of files that this process may open, as far as it may, so that each connection can have one."""
    wanted = max_connections + SPARE_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning("limits.max_connections: only %d files may be open here (ulimit -n)", allowed)


def headers_too_large() -> Problem:
    return Problem(status=431, message=f"the request line and headers are larger than {MAX_HEADER_BYTES} bytes")
