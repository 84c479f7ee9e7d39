"""What is seen of requests from outside: the series of ``/metrics``, their values, and spans."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from legacy_client import ask
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from serving_processes import ROOT, Serving, eventually

from agent.protocol import SamplingParams
from config.serving_config import MetricsConfig
from server import tracing
from server.metrics import GroupMetrics, Metrics, ModelMetrics
from server.observer import Observer
from server.request import FinishReason, GenerationParams, Request
from server.request_span import RequestSpans, join
from server.step import Row, Step

# As current releases of vLLM have them, but for those of features that are not here: adapters, speculation, offloading.
VLLM_NAMES = {
    "e2e_request_latency_seconds",
    "generation_tokens",
    "inter_token_latency_seconds",
    "iteration_tokens_total",
    "kv_cache_usage_perc",
    "num_preemptions",
    "num_requests_running",
    "num_requests_waiting",
    "prefix_cache_hits",
    "prefix_cache_queries",
    "prompt_tokens",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_inference_time_seconds",
    "request_params_max_tokens",
    "request_params_n",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_success",
    "request_time_per_output_token_seconds",
    "time_to_first_token_seconds",
}
OWN_NAMES = {
    "agent_connections_lost",
    "agent_restarts",
    "agents_ready",
    "requests_moved",
    "http_responses",
    "step_agent_seconds",
    "step_device_seconds",
    "step_plan_seconds",
    "step_post_seconds",
    "step_rows",
}
TRACE = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = 0xB7AD6B7169203331


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def values(exposition: str, prefix: str = "mindspore_llm_") -> dict[str, float]:
    """The samples of one model by name without the prefix, the buckets and what tells when a series began left out."""
    samples = [sample for family in text_string_to_metric_families(exposition) for sample in family.samples]
    return {
        sample.name.removeprefix(prefix) + sample.labels.get("finished_reason", ""): sample.value
        for sample in samples
        if sample.labels.get("model_name") in ("llama2", None) and "le" not in sample.labels
    }


def make_request(prompt_tokens: int, **params: object) -> Request:
    params = {"max_new_tokens": 8, **params}
    return Request(
        request_id="r",
        prompt_ids=[1] * prompt_tokens,
        params=GenerationParams(**params),  # type: ignore[arg-type]  # as the tests give them
        arrival=100.0,
        max_new_tokens=8,
    )


def step_of(*requests: Request, admitted: tuple[Request, ...] = ()) -> Step:
    rows = tuple(Row(request, 0, len(request.prompt_ids), True) for request in requests)
    return Step(step_id=1, rows=rows, admitted=admitted)


def live(observer: Observer, metrics: Metrics, request: Request, reason: FinishReason = "length") -> None:
    """A request's life: arrival at 100, first step at 101, tokens at 103, 104 and 107, end at 107.5."""
    observer.accepted(request)
    observer.sent(step_of(request, admitted=(request,)), GroupMetrics(metrics, "llama2", "0"), 101.0)
    for now in (103.0, 104.0, 107.0):
        observer.token(request, now)
    observer.ended(request, reason, 107.5)


@pytest.mark.parametrize("prefix", ["mindspore_llm_", "vllm:"])
def test_the_names_are_those_that_users_of_vllm_chart(prefix: str) -> None:
    metrics = Metrics(MetricsConfig(prefix=prefix))
    ModelMetrics(metrics, "llama2").group(0)
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    assert {family.name for family in families if not family.name.endswith("_created")} == {
        prefix + name for name in VLLM_NAMES | OWN_NAMES
    }
    assert all(family.documentation for family in families)


def test_the_times_of_a_request(metrics: Metrics) -> None:
    observer = Observer(ModelMetrics(metrics, "llama2"))
    request = make_request(5)
    request.num_cached_tokens = 4
    live(observer, metrics, request)
    seen = values(metrics.exposition().decode())
    expected = {
        "prompt_tokens_total": 5,
        "generation_tokens_total": 3,
        "prefix_cache_queries_total": 5,
        "prefix_cache_hits_total": 4,
        "request_success_totallength": 1,
        "request_success_totalerror": 0,
        "request_queue_time_seconds_sum": 1,
        "time_to_first_token_seconds_sum": 3,
        "request_prefill_time_seconds_sum": 2,
        "request_decode_time_seconds_sum": 4,
        "request_inference_time_seconds_sum": 6,
        "inter_token_latency_seconds_sum": 4,
        "inter_token_latency_seconds_count": 2,
        "request_time_per_output_token_seconds_sum": 2,
        "e2e_request_latency_seconds_sum": 7.5,
        "request_prompt_tokens_sum": 5,
        "request_generation_tokens_sum": 3,
        "request_params_max_tokens_sum": 8,
        "iteration_tokens_total_sum": 5,
        "step_rows_sum": 1,
    }
    assert {name: seen[name] for name in expected} == expected


def test_a_request_that_ends_in_the_queue_has_no_times_but_its_own(metrics: Metrics) -> None:
    observer = Observer(ModelMetrics(metrics, "llama2"))
    request = make_request(5, max_new_tokens=None)
    observer.accepted(request)
    observer.ended(request, "abort", 103.0)
    seen = values(metrics.exposition().decode())
    assert seen["request_success_totalabort"] == 1
    assert seen["e2e_request_latency_seconds_sum"] == 3
    for name in ("request_queue_time", "time_to_first_token", "request_prefill_time", "request_decode_time"):
        assert seen[f"{name}_seconds_count"] == 0
    assert seen["request_params_max_tokens_count"] == 0


def test_a_request_that_comes_back_has_waited_once(metrics: Metrics) -> None:
    observer = Observer(ModelMetrics(metrics, "llama2"))
    request = make_request(5)
    observer.accepted(request)
    for now in (101.0, 109.0):
        observer.sent(step_of(request, admitted=(request,)), GroupMetrics(metrics, "llama2", "0"), now)
    seen = values(metrics.exposition().decode())
    assert seen["request_queue_time_seconds_count"] == seen["request_queue_time_seconds_sum"] == 1
    assert seen["prefix_cache_queries_total"] == 5


def test_prompt_log_probabilities_are_no_queries_of_the_cache(metrics: Metrics) -> None:
    live(Observer(ModelMetrics(metrics, "llama2")), metrics, make_request(5, prompt_logprobs=True))
    assert values(metrics.exposition().decode())["prefix_cache_queries_total"] == 0


def test_restarts_are_asked_for_when_they_are_looked_at(metrics: Metrics) -> None:
    restarts = iter((0, 2))
    ModelMetrics(metrics, "llama2").group(0).show_restarts(lambda: next(restarts))
    assert [values(metrics.exposition().decode())["agent_restarts_total"] for _ in range(2)] == [0, 2]


def served(client: httpx.Client) -> dict[str, float]:
    return values(client.get("/metrics").text)


def test_the_series_of_a_running_server_agree(standin: Serving, client: httpx.Client) -> None:
    before = served(client)
    ask(client, "hello there", max_new_tokens=9, ignore_eos=True)
    ask(client, "hi", max_new_tokens=1)
    assert client.post("/models/llama2", json={"inputs": ""}).status_code == 422
    after = served(client)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["request_success_totallength"] == 2
    assert grown["generation_tokens_total"] == grown["request_generation_tokens_sum"] == 10
    assert grown["prompt_tokens_total"] == grown["request_prompt_tokens_sum"] == grown["prefix_cache_queries_total"]
    assert grown["inter_token_latency_seconds_count"] == 8
    for name in ("request_queue_time", "time_to_first_token", "request_prefill_time", "e2e_request_latency"):
        assert grown[f"{name}_seconds_count"] == 2, name
    assert grown["request_time_per_output_token_seconds_count"] == 1
    assert grown["request_params_n_count"] == 2
    parts = grown["request_queue_time_seconds_sum"] + grown["request_inference_time_seconds_sum"]
    assert 0 < parts <= grown["e2e_request_latency_seconds_sum"]
    first = grown["request_queue_time_seconds_sum"] + grown["request_prefill_time_seconds_sum"]
    assert first == pytest.approx(grown["time_to_first_token_seconds_sum"])
    steps = {name: grown[f"step_{name}_seconds_count"] for name in ("plan", "agent", "device", "post")}
    assert set(steps.values()) == {grown["step_rows_count"]} == {grown["iteration_tokens_total_count"]}
    assert grown["iteration_tokens_total_sum"] == grown["prompt_tokens_total"] + 8


def test_a_repeated_prompt_is_a_hit(client: httpx.Client) -> None:
    prompt = "a prompt that is as long as several blocks of the cache, so that its begin can be found there again"
    ask(client, prompt, max_new_tokens=2)
    before = served(client)
    ask(client, prompt, max_new_tokens=2)
    after = served(client)
    hits, queries = (after[name] - before[name] for name in ("prefix_cache_hits_total", "prefix_cache_queries_total"))
    assert 0 < hits < queries
    assert hits % 16 == 0


def test_answers_are_counted_by_status(client: httpx.Client) -> None:
    def count(status: str) -> float:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found = [s.value for s in samples if s.name == "mindspore_llm_http_responses_total"]
        labels = [s.labels["status"] for s in samples if s.name == "mindspore_llm_http_responses_total"]
        return dict(zip(labels, found, strict=True)).get(status, 0)

    before = count("404")
    client.get("/nothing")
    eventually(lambda: count("404") == before + 1)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def test_a_request_has_a_span(metrics: Metrics, provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    observer = Observer(ModelMetrics(metrics, "llama2"), RequestSpans("llama2", provider))
    request = make_request(5, sampling=SamplingParams(temperature=0.5, top_p=0.25, top_k=7))
    request.num_cached_tokens = 4
    live(observer, metrics, request)
    [span] = exporter.get_finished_spans()
    assert span.name == "text_completion llama2"
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "mindspore",
        "gen_ai.request.model": "llama2",
        "gen_ai.response.model": "llama2",
        "gen_ai.request.id": "r",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.request.top_k": 7,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_in_queue": 1.0,
        "gen_ai.latency.time_to_first_token": 3.0,
        "gen_ai.latency.time_in_model_prefill": 2.0,
        "gen_ai.latency.time_in_model_decode": 4.0,
        "gen_ai.latency.time_in_model_inference": 6.0,
        "gen_ai.latency.e2e": 7.5,
    }
    [event] = span.events
    assert span.start_time is not None
    assert event.name == "first token"
    assert event.timestamp - span.start_time == pytest.approx(3e9, abs=1e9)
    assert span.status.status_code is trace.StatusCode.UNSET


def test_a_failed_request_has_a_failed_span(
    metrics: Metrics, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    observer = Observer(ModelMetrics(metrics, "llama2"), RequestSpans("llama2", provider))
    request = make_request(5)
    observer.accepted(request)
    observer.ended(request, "error", 101.0)
    [span] = exporter.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert not span.events


@pytest.mark.parametrize("traced", [False, True])
def test_a_span_belongs_to_the_trace_of_its_caller(
    metrics: Metrics, provider: TracerProvider, exporter: InMemorySpanExporter, traced: bool
) -> None:
    """``traceparent`` says whose it is, unless the framework has made a span for the HTTP request already."""
    tracer = provider.get_tracer("test")
    http = tracer.start_span("http") if traced else trace.INVALID_SPAN

    def handle() -> None:
        with trace.use_span(http):
            join({"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"})
            live(Observer(ModelMetrics(metrics, "llama2"), RequestSpans("llama2", provider)), metrics, make_request(1))

    contextvars.copy_context().run(handle)
    [span] = exporter.get_finished_spans()
    assert span.parent is not None
    assert span.parent.span_id == (http.get_span_context().span_id if traced else PARENT)
    assert (span.parent.trace_id == TRACE) is not traced


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "collector"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_the_standard_variables_say_where_spans_go(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.exporter_name() == expected


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER is 'zipkin'; known are otlp, console and none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
    ],
)
def test_what_cannot_be_exported_is_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector")
    monkeypatch.setenv(name, value)
    tracing.start_tracing()
    assert problem in caplog.text


NO_OPENTELEMETRY = """
import logging, sys
sys.modules |= dict.fromkeys(["opentelemetry.sdk", "opentelemetry.trace", "opentelemetry.context"])
from server import tracing
tracing.start_tracing()
tracing.join_trace({"traceparent": "00-1-2-01"})
sys.exit(tracing.open_spans("llama2") is not None)
"""


def test_without_the_packages_there_are_no_spans_and_the_log_says_what_is_missing() -> None:
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "otlp"}
    command = [sys.executable, "-c", NO_OPENTELEMETRY]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "install the packages with pip install '.[otel]'" in ended.stderr
