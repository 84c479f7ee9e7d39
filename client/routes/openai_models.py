"""``GET /v1/models``, and what stands in for the routes of the OpenAI protocol that are not there."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from client.deployment import Deployment
from client.routes.errors import documented
from client.routes.problem import OPENAI
from client.routes.served import Served
from client.schemas.openai_models import ModelCard, ModelList
from server.errors import ServingError

OWNER = "mindspore-llm-serving"
NOT_HERE = (
    "responses", "messages", "embeddings", "audio", "images", "videos", "moderations", "files", "uploads", "batches",
    "fine_tuning", "vector_stores", "assistants", "threads", "realtime", "conversations", "rerank",
)  # fmt: skip
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

router = APIRouter(tags=["OpenAI"])


class NoSuchRoute(ServingError):
    """A route of the protocol that this server does not have."""

    status = 404


@router.get("/v1/models")
async def list_models(deployment: Served) -> ModelList:
    """All served names."""
    return ModelList(data=[_card(deployment, name) for model in deployment.models for name in model.config.names])


@router.get("/v1/models/{model}", responses=documented(404, dialect=OPENAI))
async def one_model(
    deployment: Served, name: Annotated[str, Path(alias="model", description="a served name")]
) -> ModelCard:
    """One served name."""
    return _card(deployment, name)


def _card(deployment: Deployment, name: str) -> ModelCard:
    server = deployment.model(name).server
    return ModelCard(id=name, created=deployment.created, owned_by=OWNER, max_model_len=server.max_model_len)


async def not_here(request: Request) -> None:
    """Say what there is instead."""
    kind = request.url.path.split("/")[2]
    raise NoSuchRoute(f"this server has no /v1/{kind}; it has /v1/chat/completions, /v1/completions and /v1/models")


for _kind in NOT_HERE:
    for _path in (f"/v1/{_kind}", f"/v1/{_kind}/{{rest:path}}"):
        router.add_api_route(_path, not_here, methods=METHODS, include_in_schema=False)
