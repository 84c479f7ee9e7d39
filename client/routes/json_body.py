"""Bodies are JSON and say so."""

from __future__ import annotations

from fastapi import HTTPException, Request


def require_json(request: Request) -> None:
    """Refuse a body that does not say that it is JSON; a browser sends such a one for any page without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "the body must be JSON, with Content-Type: application/json")
