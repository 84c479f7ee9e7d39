"""The body of every error on the operations and ``/models`` routes."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    """What went wrong and, where one field of the request is to blame, which."""

    error: str = Field(description="for a person; names the field")
    field: str | None = Field(description="the request's field that cannot be used, or null")
