"""A request as JSON, or what in it no JSON can hold, said before anything is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

from client.client_errors import InvalidRequest

INNER = "parameters."  # the server names the fields in it without it


def encoded(content: Mapping[str, object]) -> bytes:
    """``content`` in UTF-8.

    Raises:
        InvalidRequest: a field cannot be written; the error names it and has no status, as no server was asked.
    """
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        field, reason = next(_faults("", content), (None, str(error)))
        raise InvalidRequest(f"{field or 'the request'}: {reason}", field=field) from None


def _faults(field: str, value: object) -> Iterator[tuple[str | None, str]]:
    """The fields that JSON has no words for, each with what is wrong and what to do."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _faults(f"{field}.{name}".lstrip(".").removeprefix(INNER), inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _faults(f"{field}[{place}]", inner)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"a lone surrogate, {value[error.start]!r}, at character {error.start}, which is half a character"
            yield field, f'has {half}; leave it out, or replace it as in text.encode(errors="replace").decode()'
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield field, f"must be a finite number, not {value}; leave it out to have the server's default"
    elif value is not None and not isinstance(value, int):
        yield field, f"is of type {type(value).__name__}; give a text, a number, a truth value or a list of these"
