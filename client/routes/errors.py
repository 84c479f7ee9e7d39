"""From an exception to its HTTP response, in this one place.

Everything that can be refused is refused by raising: a ``ServingError`` by our own code, the rest by the framework.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from client.routes.problem import LEGACY, Dialect, Problem
from server.errors import NotServing, Overloaded, ServingError

logger = logging.getLogger(__name__)

STATUS_TEXTS = {
    400: "the body cannot be read as JSON",
    404: "there is nothing at this path; /openapi.json lists what there is",
    405: "this path does not take this method",
}
MAX_FIELD_CHARACTERS = 100  # of a name that the client made up
CLIENT_LEFT = 499  # as nginx writes it
INTERNAL = "the server could not finish this request; its log says why under request id {}"


def install(app: FastAPI) -> None:
    """Answer every exception of ``app``'s routes with a ``Problem``."""
    for kind in (ServingError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _respond)
    app.add_exception_handler(ClientDisconnect, _leave)


def documented(*statuses: int, dialect: Dialect = LEGACY) -> dict[int | str, dict[str, Any]]:
    """These error statuses for a route's ``responses``, as our other errors name them."""
    return {dialect.statuses.get(status, status): {"model": dialect.model} for status in statuses}


def problem_of(error: Exception, request_id: str) -> Problem:
    """What a client is told of ``error``; of an internal one, only where to look it up."""
    match error:
        case ServingError(status=500):
            return Problem(status=500, message=INTERNAL.format(request_id))
        case ServingError():
            headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Overloaded | NotServing) else {}
            return Problem(
                status=error.status, message=error.message, field=error.field, code=error.code, headers=headers
            )
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            message = STATUS_TEXTS.get(error.status_code, error.detail)
            return Problem(status=error.status_code, message=message, headers=dict(error.headers or {}))
        case _:
            return Problem(status=500, message=INTERNAL.format(request_id))


async def _respond(request: Request, error: Exception) -> Response:
    request_id: str = request.state.request_id
    problem = problem_of(error, request_id)
    if problem.status >= 500:
        level = logging.INFO if problem.status == 503 else logging.ERROR  # not ready is a state, not a fault
        logger.log(level, "request %s: %s: %s", request_id, type(error).__name__, error)
    # A 500 is answered outside the middleware that would add the id.
    problem.headers.setdefault("X-Request-Id", request_id)
    return problem.response(request.url.path)


async def _leave(request: Request, error: Exception) -> Response:
    """The client has left: nobody reads this, the status is for the log."""
    return Response(status_code=CLIENT_LEFT)


def _invalid(error: RequestValidationError) -> Problem:
    """The first thing that is wrong with a request, by the name that the client knows."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(
            status=400, message=f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}"
        )
    name = _field_name(first["loc"])
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])[:MAX_FIELD_CHARACTERS]
        message = "is not a field of this request" if unknown == name else f"{unknown} is not a field of it"
    return Problem(status=422, message=message if name else f"the body: {message}", field=name)


def _field_name(place: tuple[int | str, ...]) -> str | None:
    """``("body", "parameters", "stop", 2)`` → ``stop``; None is the body itself."""
    names = [part for part in place[1:] if isinstance(part, str)]
    if names[:1] == ["parameters"] and len(names) > 1:
        names = names[1:]
    return names[0][:MAX_FIELD_CHARACTERS] if names else None
