"""How the ``/models`` routes write answers: one JSON object, server-sent events, or plain lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from sse_starlette.sse import EventSourceResponse
from starlette.responses import JSONResponse, Response, StreamingResponse

PING_SECONDS = 600
RETRY_MILLISECONDS = 30_000
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # for proxies, as event streams have it

encode = json.JSONEncoder(ensure_ascii=False).encode


class JsonLine(JSONResponse):
    """One JSON object and a newline."""

    def render(self, content: Any) -> bytes:
        return (encode(content) + "\n").encode()


class StreamFormat(Protocol):
    """One way to write a stream. Every method but ``response`` makes one chunk of it."""

    def step(self, text: str, index: int) -> str:
        """The text of one step; ``index`` counts from 1."""

    def end(self, text: str | None, details: dict[str, Any] | None) -> str:
        """What follows the last step: the whole text and the details, each if asked for."""

    def error(self, message: str) -> str:
        """The stream ends here, for this reason."""

    def response(self, chunks: AsyncIterator[str]) -> Response:
        """The HTTP response that sends ``chunks`` as they come."""


class Events:
    """Server-sent events, each with a JSON object as its data."""

    def step(self, text: str, index: int) -> str:
        return event(text)

    def end(self, text: str | None, details: dict[str, Any] | None) -> str:
        return event(text or "", details=details)

    def error(self, message: str) -> str:
        return event(message, kind="error")

    def response(self, chunks: AsyncIterator[str]) -> Response:
        return EventSourceResponse(chunks, ping=PING_SECONDS)


class Lines:
    """``data:`` and a JSON object, one a line, with nothing between."""

    def step(self, text: str, index: int) -> str:
        return self._line({"token": {"text": text, "index": index}})

    def end(self, text: str | None, details: dict[str, Any] | None) -> str:
        line = {"generated_text": text, "details": details}
        return self._line({name: value for name, value in line.items() if value is not None})

    def error(self, message: str) -> str:
        return self._line({"error": message})

    def response(self, chunks: AsyncIterator[str]) -> Response:
        return StreamingResponse(chunks, media_type="text/plain", headers=UNBUFFERED)

    @staticmethod
    def _line(content: dict[str, Any]) -> str:
        return f"data:{encode(content)}\n"


def event(data: object, kind: str = "message", details: dict[str, Any] | None = None) -> str:
    """The data of one server-sent event, as the older system's clients expect it."""
    content = {"event": kind, "retry": RETRY_MILLISECONDS, "data": data}
    return encode(content if details is None else {**content, "details": details})
