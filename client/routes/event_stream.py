"""How ``/openapi.json`` speaks of server-sent events: each is an object whose ``data`` holds JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def event_stream(data: type[BaseModel], example: str | None = None, end: str | None = None) -> dict[str, Any]:
    """The ``content`` of a response whose events hold ``data``, one of the models that ``client.openapi`` adds.

    ``end`` is what the last one holds, if that is no JSON.
    """
    reference = {"$ref": f"#/components/schemas/{data.__name__}"}
    held: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": reference}
    if end is not None:
        held = {"anyOf": [held, {"const": end}]}
    event: dict[str, Any] = {"schema": {"type": "object", "required": ["data"], "properties": {"data": held}}}
    return {"text/event-stream": event if example is None else {**event, "example": example}}
