"""What a call to a server can end with instead of an answer::

    ClientError                      message, status, field, request_id
    ├── ClientClosed                 ``close`` came before, or meanwhile
    ├── NoConnection                 nobody answers there, or not who the certificate should name; nothing was generated
    ├── TimedOut                     connected, but nothing came in time
    ├── BrokenAnswer                 what came is no answer, or ended before its end
    ├── GenerationError     424 5xx  the request was accepted and could not be finished
    └── Refused             4xx 503  nothing was generated
        ├── InvalidRequest  400 413 415 422 431   ``field`` names what cannot be used; without status: cannot be sent
        ├── NotAuthorized   401 403  the API key is missing or wrong
        ├── NotFound        404 405  no such model, or no such route
        ├── Overloaded      429      the queue is full; come back after ``retry_after`` seconds
        └── NotServing      503      not started yet, or shutting down; the same

``status`` is the HTTP status, or None where there was none: after the first byte of a stream, for one. ``field`` is the
request's field that is to blame, or None. ``request_id`` finds the request in the server's log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

MAX_MESSAGE_CHARACTERS = 2000  # of an error: it may come from anybody


class ClientError(Exception):
    """A call did not end with an answer."""

    def __init__(
        self, message: str, *, status: int | None = None, field: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message[:MAX_MESSAGE_CHARACTERS])
        self.message = message[:MAX_MESSAGE_CHARACTERS]
        self.status = status
        self.field = field
        self.request_id = request_id


class ClientClosed(ClientError):
    pass


class NoConnection(ClientError):
    """``lasting`` says that trying again changes nothing."""

    lasting = False


class TimedOut(ClientError):
    pass


class BrokenAnswer(ClientError):
    pass


class GenerationError(ClientError):
    pass


class Refused(ClientError):
    retry_after: float | None = None  # seconds, if the server named them


class InvalidRequest(Refused):
    pass


class NotAuthorized(Refused):
    pass


class NotFound(Refused):
    pass


class Overloaded(Refused):
    pass


class NotServing(Refused):
    pass


_KINDS: dict[int, type[ClientError]] = {
    401: NotAuthorized,
    403: NotAuthorized,
    404: NotFound,
    405: NotFound,
    424: GenerationError,
    429: Overloaded,
    503: NotServing,
}


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """The error that an answer other than 200 stands for, in whichever protocol it is written."""
    message, field = _message(body)
    usual = BrokenAnswer if status < 400 else InvalidRequest if status < 500 else GenerationError
    kind = _KINDS.get(status, usual)
    text = message or f"the server answers with status {status} and does not say why"
    error = kind(text, status=status, field=field, request_id=headers.get("x-request-id"))
    seconds = headers.get("retry-after", "")
    if isinstance(error, Refused) and seconds.isascii() and seconds.isdecimal():
        error.retry_after = float(seconds)
    return error


def _message(body: bytes) -> tuple[str, str | None]:
    """Message and field: of ``{"error": "…", "field": "…"}``, or of OpenAI's ``error.message`` and ``error.param``."""
    try:
        content = json.loads(body)
    except ValueError:
        return body.decode(errors="replace").strip(), None
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):
        message, field = error.get("message"), error.get("param")
    else:
        message, field = error, content.get("field") if isinstance(content, dict) else None
    return message if isinstance(message, str) else "", field if isinstance(field, str) else None
