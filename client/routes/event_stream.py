"""How ``/openapi.json`` speaks of server-sent events: each is an object whose ``data`` holds JSON."""

from __future__ import annotations

from typing import Any


def event_stream(data: dict[str, Any], example: str | None = None) -> dict[str, Any]:
    """The ``content`` of a response whose events hold ``data``, a JSON schema."""
    held = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    event: dict[str, Any] = {"schema": {"type": "object", "required": ["data"], "properties": {"data": held}}}
    return {"text/event-stream": event if example is None else {**event, "example": example}}
