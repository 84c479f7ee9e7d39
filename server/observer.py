"""What is seen of requests from outside: times in the metrics, a line in the log, a span where spans are wanted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prometheus_client import Histogram

from server.metrics import GroupMetrics, ModelMetrics
from server.request import FinishReason, Request
from server.request_times import RequestTimes
from server.step import Step

if TYPE_CHECKING:  # not there without OpenTelemetry
    from server.request_span import RequestSpan, RequestSpans

_log = logging.getLogger(__name__)


class Observer:
    """Watches the requests of one model, each from ``accepted`` to ``ended``. Time is passed in: arrivals' clock."""

    def __init__(self, metrics: ModelMetrics, spans: RequestSpans | None = None) -> None:
        self._metrics = metrics
        self._open_spans = spans
        self._times: dict[Request, RequestTimes] = {}
        self._spans: dict[Request, RequestSpan] = {}

    def accepted(self, request: Request) -> None:
        """A request enters the queue. Its span belongs to the trace of whoever calls."""
        self._times[request] = RequestTimes(request.arrival)
        if self._open_spans and (span := self._open_spans.start(request)):
            self._spans[request] = span
        self._metrics.prompt_tokens.inc(len(request.prompt_ids))
        if request.params.max_new_tokens is not None:
            self._metrics.max_tokens.observe(request.params.max_new_tokens)

    def sent(self, step: Step, group: GroupMetrics, now: float) -> None:
        """A step went to a group of agents."""
        group.rows.observe(len(step.rows))
        group.step_tokens.observe(step.num_tokens)
        group.preemptions.inc(step.num_preempted)
        for request in step.admitted:
            times = self._times[request]
            if times.first_step is None:
                times.first_step = now
                self._metrics.queue_time.observe(now - request.arrival)
                if not request.params.prompt_logprobs:  # they need the whole prompt computed, so nothing is looked up
                    group.prefix_queries.inc(len(request.prompt_ids))
                    group.prefix_hits.inc(request.num_cached_tokens)

    def token(self, request: Request, now: float) -> None:
        """A token goes to its client."""
        times = self._times[request]
        self._metrics.generation_tokens.inc()
        if times.last_token is None:
            times.first_token = now
            self._metrics.first_token.observe(now - request.arrival)
        else:
            self._metrics.inter_token.observe(now - times.last_token)
        times.last_token = now
        times.num_tokens += 1

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """A request has ended, for whatever reason."""
        times = self._times.pop(request)
        self._metrics.finished[reason].inc()
        self._metrics.whole_request.observe(now - request.arrival)
        self._metrics.request_prompt_tokens.observe(len(request.prompt_ids))
        self._metrics.request_generation_tokens.observe(times.num_tokens)
        _observe(self._metrics.prefill_time, times.prefill)
        _observe(self._metrics.decode_time, times.decode)
        _observe(self._metrics.inference_time, times.inference)
        _observe(self._metrics.per_output_token, times.per_output_token)
        if span := self._spans.pop(request, None):
            span.end(reason, times, now)
        prompt, output = len(request.prompt_ids), times.num_tokens
        fields: dict[str, object] = {"request_id": request.request_id, "finish_reason": reason}
        fields |= {"prompt_tokens": prompt, "output_tokens": output}
        _log.info("request %s: %s, %d + %d tokens", request.request_id, reason, prompt, output, extra=fields)


def _observe(histogram: Histogram, value: float | None) -> None:
    if value is not None:
        histogram.observe(value)
