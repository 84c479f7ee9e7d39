"""What the server counts, in Prometheus' terms.

The names are those that vLLM's users chart, behind the prefix of ``metrics.prefix``; every series of a model has the
label ``model_name``, the first served name. What belongs to a group of its agents has the label ``engine`` as well, the
number of the group; requests have not, since they can go on in another. Gauges are read when they are scraped, so they
cost a step nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from config.serving_config import MetricsConfig
from server.request import FinishReason

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)  # seconds
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)  # seconds
_STEP = (0.0001, 0.0003, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)  # seconds
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUEST_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

_GAUGES = {
    "num_requests_running": "Requests with a seat in the batch.",
    "num_requests_waiting": "Requests in the queue.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks in use, 0 to 1.",
    "agents_ready": "1 if every agent has answered lately.",
}
_GROUP_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens that were looked up in the cache.",
    "prefix_cache_hits": "Prompt tokens that were found there, and not computed again.",
    "num_preemptions": "Requests sent back to the queue for want of a cache block.",
    "agent_connections_lost": "Times that the connection to the agents broke.",
}
_GROUP_HISTOGRAMS = {
    "iteration_tokens_total": ("Tokens of a step.", _STEP_TOKENS),
    "step_rows": ("Rows of a step.", _ROWS),
    "step_plan_seconds": ("Of a step: scheduling it and sending its plan.", _STEP),
    "step_agent_seconds": ("Of a step: from the plan's arrival at the agent to its answer.", _STEP),
    "step_device_seconds": ("Of a step: in the model's graph.", _STEP),
    "step_post_seconds": ("Of a step: taking its tokens over and passing them on.", _STEP),
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "generation_tokens": "Tokens of answers.",
    "requests_moved": "Requests that another group of agents went on with, when theirs was lost.",
}
_HISTOGRAMS = {
    "request_queue_time_seconds": ("From arrival to the first step.", _LATENCY),
    "request_prefill_time_seconds": ("From the first step to the answer's first token.", _LATENCY),
    "request_decode_time_seconds": ("From the answer's first token to its last.", _LATENCY),
    "request_inference_time_seconds": ("From the first step to the answer's last token.", _LATENCY),
    "time_to_first_token_seconds": ("From arrival to the answer's first token.", _LATENCY),
    "inter_token_latency_seconds": ("Between neighbouring tokens of an answer.", _TOKEN),
    "request_time_per_output_token_seconds": ("Between neighbouring tokens, the mean of each answer.", _TOKEN),
    "e2e_request_latency_seconds": ("From arrival to the answer's end.", _LATENCY),
    "request_prompt_tokens": ("Tokens of a request's prompt.", _REQUEST_TOKENS),
    "request_generation_tokens": ("Tokens of a request's answer.", _REQUEST_TOKENS),
    "request_params_max_tokens": ("The most tokens that a request asked for, where it did.", _REQUEST_TOKENS),
    "request_params_n": ("Answers that were asked for to one prompt.", (1, 2, 5, 10, 20)),
}


class Metrics:
    """The metrics of one app, with a registry of its own. Several models share them, told apart by their label."""

    def __init__(self, config: MetricsConfig | None = None) -> None:
        prefix = (config or MetricsConfig()).prefix
        self.registry = CollectorRegistry()
        label, group, registry = ["model_name"], ["model_name", "engine"], self.registry
        self.gauges = {name: Gauge(prefix + name, text, group, registry=registry) for name, text in _GAUGES.items()}
        self.counters = {
            name: Counter(prefix + name, text, labels, registry=registry)
            for labels, counters in ((label, _COUNTERS), (group, _GROUP_COUNTERS))
            for name, text in counters.items()
        }
        self.histograms = {
            name: Histogram(prefix + name, text, labels, registry=registry, buckets=buckets)
            for labels, histograms in ((label, _HISTOGRAMS), (group, _GROUP_HISTOGRAMS))
            for name, (text, buckets) in histograms.items()
        }
        self.finished = Counter(
            prefix + "request_success", "Requests that ended, by how.", [*label, "finished_reason"], registry=registry
        )
        self.restarts = AgentRestarts(prefix + "agent_restarts")
        registry.register(self.restarts)
        self._responses = Counter(prefix + "http_responses", "HTTP requests, by status.", ["status"], registry=registry)

    def count_response(self, status: int) -> None:
        """An HTTP request was answered; 0: its client left before."""
        self._responses.labels(status).inc()

    def total(self, name: str, model_name: str) -> float:
        """What a counter of one model, or of all groups of its agents together, stands at."""
        [family] = self.counters[name].collect()
        return sum(
            sample.value
            for sample in family.samples
            if sample.labels["model_name"] == model_name and sample.name.endswith("_total")
        )

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)


class AgentRestarts(Collector):
    """A counter that is kept elsewhere, by whoever starts the agents, and read when it is scraped."""

    def __init__(self, name: str) -> None:
        self.readers: dict[tuple[str, str], Callable[[], int]] = {}  # by model name and number of the group
        self._name = name

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            self._name, "Times that a group of agents was started anew.", labels=["model_name", "engine"]
        )
        for labels, read in self.readers.items():
            family.add_metric(labels, read())
        yield family


class ModelMetrics:
    """The series of one model, looked up once: ``labels`` takes longer than what it counts."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        counters = {name: metrics.counters[name].labels(model_name) for name in _COUNTERS}
        self.prompt_tokens = counters["prompt_tokens"]
        self.generation_tokens = counters["generation_tokens"]
        self.moved = counters["requests_moved"]
        histograms = {name: metrics.histograms[name].labels(model_name) for name in _HISTOGRAMS}
        self.queue_time = histograms["request_queue_time_seconds"]
        self.prefill_time = histograms["request_prefill_time_seconds"]
        self.decode_time = histograms["request_decode_time_seconds"]
        self.inference_time = histograms["request_inference_time_seconds"]
        self.first_token = histograms["time_to_first_token_seconds"]
        self.inter_token = histograms["inter_token_latency_seconds"]
        self.per_output_token = histograms["request_time_per_output_token_seconds"]
        self.whole_request = histograms["e2e_request_latency_seconds"]
        self.request_prompt_tokens = histograms["request_prompt_tokens"]
        self.request_generation_tokens = histograms["request_generation_tokens"]
        self.max_tokens = histograms["request_params_max_tokens"]
        self.n = histograms["request_params_n"]
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        self.finished = {reason: metrics.finished.labels(model_name, reason) for reason in reasons}
        self._metrics = metrics
        self._model_name = model_name

    def group(self, number: int) -> GroupMetrics:
        """The series of one group of the model's agents."""
        return GroupMetrics(self._metrics, self._model_name, str(number))


class GroupMetrics:
    """The series of one group of a model's agents."""

    def __init__(self, metrics: Metrics, model_name: str, engine: str) -> None:
        labels = model_name, engine
        gauges = {name: gauge.labels(*labels) for name, gauge in metrics.gauges.items()}
        self.running = gauges["num_requests_running"]
        self.waiting = gauges["num_requests_waiting"]
        self.cache_usage = gauges["kv_cache_usage_perc"]
        self.ready = gauges["agents_ready"]
        counters = {name: metrics.counters[name].labels(*labels) for name in _GROUP_COUNTERS}
        self.prefix_queries = counters["prefix_cache_queries"]
        self.prefix_hits = counters["prefix_cache_hits"]
        self.preemptions = counters["num_preemptions"]
        self.connections_lost = counters["agent_connections_lost"]
        histograms = {name: metrics.histograms[name].labels(*labels) for name in _GROUP_HISTOGRAMS}
        self.step_tokens = histograms["iteration_tokens_total"]
        self.rows = histograms["step_rows"]
        self.plan = histograms["step_plan_seconds"]
        self.agent = histograms["step_agent_seconds"]
        self.device = histograms["step_device_seconds"]
        self.post = histograms["step_post_seconds"]
        self._restarts = metrics.restarts
        self._labels = labels
        self.show_restarts(lambda: 0)

    def show_restarts(self, read: Callable[[], int]) -> None:
        """Let the counter of the agents' restarts ask ``read`` when it is scraped."""
        self._restarts.readers[self._labels] = read
