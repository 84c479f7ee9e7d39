"""What a server says of itself: its models, whether it is ready, and how busy it is."""

from __future__ import annotations

from collections.abc import Callable
from operator import add

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from client.answers import Lines, decode
from client.client_errors import BrokenAnswer, NotFound, NotServing
from client.http_session import Session

PREFIX = "mindspore_llm_"
GAUGES: dict[str, Callable[[float, float], float]] = {  # and what makes one of those of several groups of agents
    "agents_ready": max,
    "num_requests_running": add,
    "num_requests_waiting": add,
    "kv_cache_usage_perc": max,
}


class Status(msgspec.Struct, frozen=True):
    """One moment of a server."""

    ready: bool
    reason: str | None  # why it is not ready
    batch_size: int  # of the running step, all models together
    waiting: int  # requests in the queue, the same
    models: dict[str, dict[str, float]]  # by first served name: its gauges


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Number(msgspec.Struct):
    data: int


def served_names(session: Session) -> list[str]:
    """The names under which models are served, the first one first.

    Raises:
        ClientError: the server does not say.
    """
    try:
        content = session.call("/v1/models")
    except NotFound:
        raise NotFound("this server does not list its models; name one with --model", status=404) from None
    return [model.id for model in decode(content, _Models).data]


def read_status(session: Session) -> Status:
    """How the server is.

    Raises:
        ClientError: it does not say.
    """
    reason = None
    try:
        session.call("/health")
    except NotServing as error:
        reason = error.message
    return Status(
        ready=reason is None,
        reason=reason,
        batch_size=_number(session.call("/serving/get_bs")),
        waiting=_number(session.call("/serving/get_request_numbers")),
        models=_gauges(session.call("/metrics").decode()),
    )


def _number(stream: bytes) -> int:
    """The number of the one event of a ``/serving`` query."""
    found = Lines(_Number).feed(stream)
    if len(found) != 1:
        raise BrokenAnswer("a query of this server is answered with one number")
    return found[0].data


def _gauges(metrics: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics):
        name = family.name.removeprefix(PREFIX)
        if combined := GAUGES.get(name):
            for sample in family.samples:
                gauges = found.setdefault(sample.labels["model_name"], {})
                gauges[name] = combined(gauges.get(name, 0.0), sample.value)
    return found
