"""The bodies of errors, one for each protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    """On the operations and ``/models`` routes: what went wrong and, where one field is to blame, which."""

    error: str = Field(description="for a person; names the field")
    field: str | None = Field(description="the request's field that cannot be used, or null")


class OpenAIError(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: str = Field(description="invalid_request_error, rate_limit_exceeded or server_error")
    param: str | None = Field(description="the request's field that cannot be used, or null")
    code: str | None = Field(description="model_not_found, invalid_api_key, … or null")


class OpenAIErrorBody(BaseModel):
    """On the OpenAI routes."""

    error: OpenAIError


class TgiErrorBody(BaseModel):
    """On the routes of Text Generation Inference."""

    error: str
    error_type: Literal["validation", "generation", "overloaded", "not_found", "unauthorized", "unavailable"]
