"""What the server counts, in Prometheus' terms.

The names are those that vLLM's users chart, with ``mindspore_llm_`` in front; every series has the label
``model_name``, the first served name. Gauges are read when they are scraped, so they cost a step nothing.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from server.request import FinishReason

PREFIX = "mindspore_llm_"

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)  # seconds
_STEP = (0.0001, 0.0003, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)  # seconds
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_GAUGES = {
    "num_requests_running": "Requests with a seat in the batch.",
    "num_requests_waiting": "Requests in the queue.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks in use, 0 to 1.",
    "agents_ready": "1 if every agent has answered lately.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "generation_tokens": "Tokens of answers.",
    "num_preemptions": "Requests sent back to the queue for want of a cache block.",
    "agent_connections_lost": "Times that the connection to the agents broke.",
}
_HISTOGRAMS = {
    "request_queue_time_seconds": ("From arrival to the first step.", _LATENCY),
    "time_to_first_token_seconds": ("From arrival to the answer's first token.", _LATENCY),
    "inter_token_latency_seconds": ("Between neighbouring tokens of an answer.", _LATENCY),
    "e2e_request_latency_seconds": ("From arrival to the answer's end.", _LATENCY),
    "step_plan_seconds": ("Of a step: scheduling it and sending its plan.", _STEP),
    "step_agent_seconds": ("Of a step: from the plan's arrival at the agent to its answer.", _STEP),
    "step_device_seconds": ("Of a step: in the model's graph.", _STEP),
    "step_post_seconds": ("Of a step: taking its tokens over and passing them on.", _STEP),
    "step_rows": ("Rows of a step.", _ROWS),
}


class Metrics:
    """The metrics of one app, with a registry of its own. Several models share them, told apart by their label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        label, registry = ["model_name"], self.registry
        self.gauges = {name: Gauge(PREFIX + name, text, label, registry=registry) for name, text in _GAUGES.items()}
        self.counters = {
            name: Counter(PREFIX + name, text, label, registry=registry) for name, text in _COUNTERS.items()
        }
        self.histograms = {
            name: Histogram(PREFIX + name, text, label, registry=registry, buckets=buckets)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self.finished = Counter(
            PREFIX + "request_success", "Requests that ended, by how.", [*label, "finished_reason"], registry=registry
        )

    def values(self, model_name: str) -> dict[str, float]:
        """What the gauges and counters of one model stand at, by their names without prefix and suffix."""
        series = {**self.gauges, **self.counters}
        return {name: _value(one.labels(model_name)) for name, one in series.items()}

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)


def _value(series: MetricWrapperBase) -> float:
    [metric] = series.collect()
    return metric.samples[0].value  # a counter's second sample is when it was made


class ModelMetrics:
    """The series of one model, looked up once: ``labels`` takes longer than what it counts."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        gauges = {name: gauge.labels(model_name) for name, gauge in metrics.gauges.items()}
        self.running = gauges["num_requests_running"]
        self.waiting = gauges["num_requests_waiting"]
        self.cache_usage = gauges["kv_cache_usage_perc"]
        self.ready = gauges["agents_ready"]
        counters = {name: counter.labels(model_name) for name, counter in metrics.counters.items()}
        self.prompt_tokens = counters["prompt_tokens"]
        self.generation_tokens = counters["generation_tokens"]
        self.preemptions = counters["num_preemptions"]
        self.connections_lost = counters["agent_connections_lost"]
        histograms = {name: histogram.labels(model_name) for name, histogram in metrics.histograms.items()}
        self.queue_time = histograms["request_queue_time_seconds"]
        self.first_token = histograms["time_to_first_token_seconds"]
        self.inter_token = histograms["inter_token_latency_seconds"]
        self.whole_request = histograms["e2e_request_latency_seconds"]
        self.plan = histograms["step_plan_seconds"]
        self.agent = histograms["step_agent_seconds"]
        self.device = histograms["step_device_seconds"]
        self.post = histograms["step_post_seconds"]
        self.rows = histograms["step_rows"]
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        self.finished = {reason: metrics.finished.labels(model_name, reason) for reason in reasons}
