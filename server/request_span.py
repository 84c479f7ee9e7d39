"""The span of a request, with the attributes of OpenTelemetry's conventions for generative AI and vLLM's latencies.

Needs ``opentelemetry-api``; only ``server/tracing.py`` imports it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from server.request import FinishReason, Request
from server.request_times import RequestTimes

NANOSECONDS = 1_000_000_000
OPERATION = "text_completion"

_propagator = TraceContextTextMapPropagator()


def join(headers: Mapping[str, str]) -> None:
    """Make the span that ``traceparent`` names the parent of this task's, unless it has one already."""
    if not trace.get_current_span().get_span_context().is_valid:
        context.attach(_propagator.extract(dict(headers)))  # the task ends with the request


class RequestSpans:
    """Makes the spans of one model's requests."""

    def __init__(self, model_name: str, provider: trace.TracerProvider | None = None) -> None:
        """Without a ``provider`` it is the process's."""
        self._model_name = model_name
        self._tracer = trace.get_tracer("server", tracer_provider=provider)

    def start(self, request: Request) -> RequestSpan | None:
        """The span of a request that enters the queue, below the caller's own; None if nobody records it."""
        span = self._tracer.start_span(f"{OPERATION} {self._model_name}")
        if not span.is_recording():
            return None
        span.set_attributes(_asked(request, self._model_name))
        return RequestSpan(span, request)


class RequestSpan:
    """One request's span, from the queue to its end."""

    def __init__(self, span: trace.Span, request: Request) -> None:
        self._span = span
        self._request = request
        self._started = time.time_ns()

    def end(self, reason: FinishReason, times: RequestTimes, now: float) -> None:
        """The request has ended at ``now``, which is of the clock of its arrival."""
        self._span.set_attributes(_answered(self._request, reason, times, now))
        if (waited := times.to_first_token) is not None:
            self._span.add_event("first token", timestamp=self._started + int(waited * NANOSECONDS))
        if reason == "error":
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


def _asked(request: Request, model_name: str) -> dict[str, AttributeValue]:
    sampling = request.params.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": OPERATION,
        "gen_ai.provider.name": "mindspore",
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name,
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.max_tokens": request.max_new_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
    }
    if sampling.temperature > 0:
        attributes |= {"gen_ai.request.top_p": sampling.top_p, "gen_ai.request.top_k": sampling.top_k}
    return attributes


def _answered(request: Request, reason: FinishReason, times: RequestTimes, now: float) -> dict[str, AttributeValue]:
    latencies = {
        "time_in_queue": times.queue,
        "time_to_first_token": times.to_first_token,
        "time_in_model_prefill": times.prefill,
        "time_in_model_decode": times.decode,
        "time_in_model_inference": times.inference,
        "e2e": now - request.arrival,
    }
    return {
        "gen_ai.response.finish_reasons": (reason,),
        "gen_ai.usage.output_tokens": times.num_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.num_cached_tokens,
        **{f"gen_ai.latency.{name}": seconds for name, seconds in latencies.items() if seconds is not None},
    }
