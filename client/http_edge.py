"""What every request passes before a route sees it: its id, the limits on headers and body, one line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from client.routes.problem import Problem

MAX_HEADER_BYTES = 16 << 10  # request line and headers together

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class HttpEdge:
    """ASGI middleware around all routes. ``scope["state"]["request_id"]`` holds the id that it takes or makes."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0  # no answer: the client left before it

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._app(scope, _bounded(receive, self._max_body_bytes), send_marked)
            else:
                await refusal.response(scope["path"])(scope, receive, send_marked)
        finally:
            milliseconds = 1000 * (time.perf_counter() - started)
            logger.info("%s %s %s %d %.1f ms", request_id, scope["method"], scope["path"], status, milliseconds)

    def _refusal(self, scope: Scope, headers: Headers) -> Problem | None:
        """What can be refused from the headers alone, before a byte of the body is read."""
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return headers_too_large()
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self._max_body_bytes:
            return Problem(status=413, message=_too_large(self._max_body_bytes))
        return None


class JsonH11Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, answering what is no HTTP request in the shape of our other errors."""

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        problem = headers_too_large() if hint == 431 else Problem(status=400, message="this is not an HTTP request")
        response = problem.response(path="")  # nobody knows whose client this is
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=problem.status, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def headers_too_large() -> Problem:
    return Problem(status=431, message=f"the request line and headers are larger than {MAX_HEADER_BYTES} bytes")


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes"


def _request_id(headers: Headers) -> str:
    """The client's own id if it is harmless in a log and a header, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _bounded(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    """``receive``, for a body that does not announce its size or announces a wrong one."""
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        message = await receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _too_large(limit))
        return message

    return receive_bounded
