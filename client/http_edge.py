"""What every request passes before a route sees it: its id, the limits on headers and body, one line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.api_keys import is_open
from client.http_connection import MAX_HEADER_BYTES, SURPLUS, headers_too_large
from client.routes.problem import Problem
from config.log_file import REQUEST_ID
from server.tracing import join_trace

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class HttpEdge:
    """ASGI middleware around all routes. ``scope["state"]["request_id"]`` holds the id that it takes or makes.

    ``on_answer`` gets the status of each answer; 0: the client left before it.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, on_answer: Callable[[int], None] = lambda status: None
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)  # the task ends with the request
        join_trace(headers)
        status = 0

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
            self._on_answer(status)
            milliseconds = 1000 * (time.perf_counter() - started)
            method, path = scope["method"], scope["path"]
            fields = {"method": method, "path": path, "status": status, "milliseconds": round(milliseconds, 1)}
            logger.info("%s %s %s %d %.1f ms", request_id, method, path, status, milliseconds, extra=fields)

    def _refusal(self, scope: Scope, headers: Headers) -> Problem | None:
        """What can be refused from the headers alone, before a byte of the body is read."""
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return headers_too_large()
        if scope["state"].get(SURPLUS) and not is_open(scope["path"]):
            headers_of_refusal = {"Retry-After": "1", "Connection": "close"}
            return Problem(
                status=429, message="too many connections are open; try again later", headers=headers_of_refusal
            )
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may see two requests here
            message = "has both Content-Length and Transfer-Encoding, so nobody knows where it ends"
            return Problem(status=400, message=message, headers={"Connection": "close"})
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self._max_body_bytes:
            return Problem(status=413, message=_too_large(self._max_body_bytes))
        return None


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
