"""What an operator asks: is it alive, is it ready, how full is it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response

from client.deployment import Deployment, ServedModel
from client.routes.errors import documented
from client.routes.event_stream import event_stream
from client.routes.legacy_formats import PING_SECONDS, event
from client.routes.served import Served
from client.schemas.legacy import LegacyEvent
from client.schemas.status import AgentStatus, ModelStatus, ServingStatus
from config.version import __version__

router = APIRouter(tags=["operations"])

EVENT = 'data: {"event": "message", "retry": 30000, "data": 0}\r\n\r\n'
ONE_EVENT: dict[int | str, dict[str, Any]] = {200: {"content": event_stream(LegacyEvent, EVENT)}, **documented(404)}


OneModel = Annotated[str | None, Query(description="a served name; left out: all models together")]


@router.get("/serving/get_bs", response_class=Response, responses=ONE_EVENT)
async def get_bs(deployment: Served, model: OneModel = None) -> Response:
    """The current batch size, as one server-sent event."""
    return _total(deployment, model, lambda served: served.server.batch_size)


@router.get("/serving/get_request_numbers", response_class=Response, responses=ONE_EVENT)
async def get_request_numbers(deployment: Served, model: OneModel = None) -> Response:
    """The number of requests that wait in the queue, as one server-sent event."""
    return _total(deployment, model, lambda served: served.server.num_waiting)


@router.get("/serving/status")
async def status(deployment: Served) -> ServingStatus:
    """Load, queue, cache and agents of every model, for a page that asks again each second."""
    return ServingStatus(
        version=__version__,
        uptime_seconds=deployment.uptime_seconds,
        draining=deployment.draining,
        models=[_status(model, deployment) for model in deployment.models],
    )


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health/ready", responses=documented(503))
@router.get("/health", responses=documented(503))
async def ready(deployment: Served) -> dict[str, str]:
    """Every agent of every model has answered a step lately, and the server is not shutting down."""
    deployment.check_ready()
    return {"status": "ready"}


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(deployment: Served) -> Response:
    """Prometheus text."""
    return Response(deployment.metrics.exposition(), media_type="text/plain; version=0.0.4")


def _status(model: ServedModel, deployment: Deployment) -> ModelStatus:
    values = deployment.metrics.values(model.server.name)
    return ModelStatus(
        names=list(model.config.names),
        ready=model.ready,
        context_length=model.server.max_model_len,
        max_running=deployment.config.limits.max_num_seqs,
        running=int(values["num_requests_running"]),
        waiting=int(values["num_requests_waiting"]),
        cache_usage=values["kv_cache_usage_perc"],
        prompt_tokens=int(values["prompt_tokens"]),
        generation_tokens=int(values["generation_tokens"]),
        preemptions=int(values["num_preemptions"]),
        agents=[
            AgentStatus(address=address, connected=connected)
            for address, connected in model.server.agent_connections.items()
        ],
    )


def _total(deployment: Deployment, name: str | None, number: Callable[[ServedModel], int]) -> Response:
    models = deployment.models if name is None else (deployment.model(name),)
    content = event(sum(map(number, models)))

    async def events() -> AsyncIterator[str]:
        yield content

    return EventSourceResponse(events(), ping=PING_SECONDS)
