"""What an operator asks: is it alive, is it ready, how full is it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from statistics import fmean
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
from client.schemas.status import AgentStatus, GroupStatus, ModelStatus, ServingStatus
from config.version import __version__
from server.replica import Replica

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
    """Every agent of every model has answered a step lately, and the server is not shutting down.

    Where a model has several groups of agents, those of one are enough.
    """
    deployment.check_ready()
    return {"status": "ready"}


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(deployment: Served) -> Response:
    """Prometheus text."""
    return Response(deployment.metrics.exposition(), media_type="text/plain; version=0.0.4")


def _status(model: ServedModel, deployment: Deployment) -> ModelStatus:
    server = model.server
    groups = [_group_status(replica) for replica in server.replicas]
    count = partial(deployment.metrics.total, model_name=server.name)
    return ModelStatus(
        names=list(model.config.names),
        ready=model.ready,
        context_length=server.max_model_len,
        max_running=deployment.config.limits.max_num_seqs * len(groups),
        running=sum(group.running for group in groups),
        waiting=sum(group.waiting for group in groups),
        cache_usage=fmean(group.cache_usage for group in groups),
        prompt_tokens=int(count("prompt_tokens")),
        generation_tokens=int(count("generation_tokens")),
        preemptions=int(count("num_preemptions")),
        agents=[
            AgentStatus(address=address, connected=connected, group=number)
            for number, replica in enumerate(server.replicas)
            for address, connected in replica.agents.connections.items()
        ],
        groups=groups,
    )


def _group_status(replica: Replica) -> GroupStatus:
    return GroupStatus(
        ready=replica.ready,
        running=replica.num_running,
        waiting=replica.num_waiting,
        cache_usage=replica.cache_usage,
    )


def _total(deployment: Deployment, name: str | None, number: Callable[[ServedModel], int]) -> Response:
    models = deployment.models if name is None else (deployment.model(name),)
    content = event(sum(map(number, models)))

    async def events() -> AsyncIterator[str]:
        yield content

    return EventSourceResponse(events(), ping=PING_SECONDS)
