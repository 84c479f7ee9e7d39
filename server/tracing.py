"""OpenTelemetry traces, where the operator wants them: the standard ``OTEL_*`` variables say so and say where to.

Spans are sent if ``OTEL_TRACES_EXPORTER`` is ``otlp`` or ``console``, or if a variable names an OTLP endpoint. The
packages come with ``pip install '.[otel]'``; without them a warning says so once, and nothing else changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.request_span import RequestSpans

PROTOCOL = "http/protobuf"

_log = logging.getLogger(__name__)


class TracingError(Exception):
    """Spans are wanted and cannot be sent; the message says why."""


def exporter_name() -> str | None:
    """Where spans are to go, ``otlp`` or ``console``; None if nobody wants them.

    Raises:
        TracingError: a variable asks for what is not there.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    endpoint = _variable("TRACES_ENDPOINT") or _variable("ENDPOINT")
    name = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if name not in ("otlp", "console", "none"):
        raise TracingError(f"OTEL_TRACES_EXPORTER is {name!r}; known are otlp, console and none")
    protocol = _variable("TRACES_PROTOCOL") or _variable("PROTOCOL") or PROTOCOL
    if name == "otlp" and protocol != PROTOCOL:
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; spans are sent as {PROTOCOL} only")
    return None if name == "none" else name


def start_tracing() -> None:
    """Let this process send its spans, if they are wanted. Called once, when the log is open."""
    try:
        name = exporter_name()
        if name is None:
            return
        from server.span_export import start_export

        start_export(name)
    except TracingError as error:
        _log.warning("no traces are sent: %s", error)
    except ImportError as error:
        _log.warning("no traces are sent: %s; install the packages with pip install '.[otel]'", error)
    else:
        _log.info("traces are sent to %s", name)


def open_spans(model_name: str) -> RequestSpans | None:
    """What makes the spans of one model's requests; None where nobody can want any."""
    try:
        from server.request_span import RequestSpans
    except ImportError:
        return None
    return RequestSpans(model_name)


def join_trace(headers: Mapping[str, str]) -> None:
    """Let what this task does belong to the trace that a request's ``traceparent`` names."""
    if "traceparent" in headers:
        try:
            from server.request_span import join
        except ImportError:
            return
        join(headers)


def _variable(name: str) -> str | None:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{name}")
