"""``GET /v1/models``: what is served."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """One served name."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970: when this server started")
    owned_by: str
    max_model_len: int = Field(description="tokens of prompt and answer together")


class ModelList(BaseModel):
    """All served names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
