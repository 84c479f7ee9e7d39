"""Health, queue, metrics and logs of a running deployment, and what becomes of requests whose clients leave."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import TEMPLATES
from legacy_client import ask, events
from prometheus_client.parser import text_string_to_metric_families
from serving_processes import Serving, eventually, serving, standin_deployment

from agent.arithmetic_model import answer
from config.version import __version__

LONG = {"ignore_eos": True, "max_new_tokens": 4000, "return_full_text": False}


def number(client: httpx.Client, path: str) -> int:
    """The number in the one event of a ``/serving`` query."""
    response = client.get(path)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    [event] = events(response.content)
    assert event == {"event": "message", "retry": 30000, "data": event["data"]}
    value: int = event["data"]
    return value


def gauge(client: httpx.Client, name: str, model: str = "llama2") -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    [value] = [s.value for s in samples if s.name == f"mindspore_llm_{name}" and s.labels["model_name"] == model]
    return float(value)


@contextlib.contextmanager
def running(client: httpx.Client, protocol: str = "sse", inputs: str = "hi") -> Iterator[Iterator[bytes]]:
    """A long stream that has begun: its further chunks."""
    body = {"inputs": inputs, "parameters": {**LONG, "return_protocol": protocol}}
    with client.stream("POST", "/models/llama2/generate_stream", json=body) as response:
        assert response.status_code == 200
        chunks = response.iter_raw()
        next(chunks)
        yield chunks


def idle(client: httpx.Client) -> bool:
    return (gauge(client, "num_requests_running"), gauge(client, "kv_cache_usage_perc")) == (0.0, 0.0)


def test_a_started_deployment_is_live_and_ready(client: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready", "/health"):
        assert client.get(path).status_code == 200


def test_an_idle_deployment_counts_nothing(client: httpx.Client) -> None:
    eventually(lambda: idle(client))
    for path in ("/serving/get_bs", "/serving/get_request_numbers"):
        assert number(client, path) == number(client, f"{path}?model=internlm") == 0
        unknown = client.get(f"{path}?model=gpt")
        assert unknown.status_code == 404
        assert "llama2" in unknown.json()["error"]


def test_batch_size_and_queue_are_those_of_the_moment(slow_standin: Serving) -> None:
    client = slow_standin.client()
    with ThreadPoolExecutor() as threads:
        with running(client), running(client):  # there are two seats
            eventually(lambda: number(client, "/serving/get_bs") == 2)
            assert number(client, "/serving/get_request_numbers") == 0
            waiting = [threads.submit(ask, client, "hi", max_new_tokens=3) for _ in range(2)]
            eventually(lambda: number(client, "/serving/get_request_numbers?model=llama2") == 2)
            refused = client.post("/models/internlm", json={"inputs": "hi"})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert set(refused.json()) == {"error", "field"}
        assert [call.result() for call in waiting] == [{"generated_text": answer("hi", 3)}] * 2


@pytest.mark.parametrize("protocol", ["sse", "lines"])
def test_a_client_that_leaves_its_stream_frees_its_blocks(slow_standin: Serving, protocol: str) -> None:
    client = slow_standin.client()
    with running(client, protocol):
        assert gauge(client, "num_requests_running") == 1
        assert gauge(client, "kv_cache_usage_perc") > 0
    eventually(lambda: idle(client))


@pytest.mark.parametrize("path", ["/models/llama2", "/models/llama2/generate_stream"])
@pytest.mark.parametrize("size", [2, 5000, 200_000])
def test_a_client_that_leaves_before_any_answer_frees_its_blocks(slow_standin: Serving, path: str, size: int) -> None:
    client = slow_standin.client()
    body = json.dumps({"inputs": "hi", "parameters": LONG, "padding": False}).encode() + b" " * size
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", slow_standin.port)) as connection:
        connection.sendall(head.encode() + body)
        eventually(lambda: gauge(client, "num_requests_running") == 1)
    eventually(lambda: idle(client))
    if path == "/models/llama2":
        eventually(lambda: client.get("/health").is_success and f"POST {path} 499" in slow_standin.log)


def test_a_client_that_leaves_while_it_waits_in_the_queue_is_forgotten(slow_standin: Serving) -> None:
    client = slow_standin.client()
    with running(client), running(client):
        body = json.dumps({"inputs": "hi"}).encode()
        with socket.create_connection(("127.0.0.1", slow_standin.port)) as connection:
            head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(b"POST /models/llama2 HTTP/1.1\r\n" + head.encode() + body)
            eventually(lambda: number(client, "/serving/get_request_numbers") == 1)
        eventually(lambda: number(client, "/serving/get_request_numbers") == 0)
    eventually(lambda: idle(client))


def test_metrics_are_prometheus_text_and_count(client: httpx.Client) -> None:
    before = gauge(client, "generation_tokens_total")
    ask(client, "hi", max_new_tokens=7, ignore_eos=True)
    assert gauge(client, "generation_tokens_total") == before + 7
    assert client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert gauge(client, "agents_ready") == 1


@pytest.mark.slow
def test_models_are_counted_together_or_one_by_one(tmp_path: Path) -> None:
    models = [{"step_seconds": 0.02}, {"names": ["second"]}]
    with serving(tmp_path, models) as deployment:
        client = deployment.client()
        with running(client):
            eventually(lambda: number(client, "/serving/get_bs") == 1)
            eventually(lambda: number(client, "/serving/get_bs?model=llama2") == 1)
            assert number(client, "/serving/get_bs?model=second") == 0
            assert ask(client, "hi", name="second", max_new_tokens=3) == {"generated_text": answer("hi", 3)}


def test_the_status_says_what_the_metrics_say(client: httpx.Client) -> None:
    before = client.get("/serving/status").json()
    ask(client, "hi", max_new_tokens=7, ignore_eos=True)
    eventually(lambda: idle(client))
    status = client.get("/serving/status").json()
    assert (status["version"], status["draining"]) == (__version__, False)
    assert status["uptime_seconds"] > before["uptime_seconds"] > 0
    [model], [earlier] = status["models"], before["models"]
    assert model["names"] == ["llama2", "internlm", *TEMPLATES]
    assert (model["ready"], model["context_length"], model["max_running"]) == (True, 8192, 64)
    assert (model["running"], model["waiting"], model["cache_usage"]) == (0, 0, 0.0)
    assert model["generation_tokens"] == earlier["generation_tokens"] + 7 == gauge(client, "generation_tokens_total")
    assert model["prompt_tokens"] > earlier["prompt_tokens"]
    assert model["preemptions"] == gauge(client, "num_preemptions_total")
    [agent] = model["agents"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", agent["address"])
    assert (agent["connected"], agent["group"]) == (True, 0)
    assert model["groups"] == [{"ready": True, "running": 0, "waiting": 0, "cache_usage": 0.0}]


def test_the_status_shows_the_batch_the_queue_and_the_cache(slow_standin: Serving) -> None:
    client = slow_standin.client()

    def counts() -> tuple[int, int, bool]:
        [model] = client.get("/serving/status").json()["models"]
        return model["running"], model["waiting"], model["cache_usage"] > 0

    with ThreadPoolExecutor() as threads:
        with running(client), running(client):  # there are two seats
            call = threads.submit(ask, client, "hi", max_new_tokens=3)
            eventually(lambda: counts() == (2, 1, True))
        assert call.result() == {"generated_text": answer("hi", 3)}
    eventually(lambda: counts() == (0, 0, False))


@pytest.mark.slow
def test_the_status_tells_of_agents_that_are_away(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    try:
        agents = deployment.start_agents()
        deployment.start_app()
        client = deployment.client()
        agents.stop()

        def away() -> bool:
            [model] = client.get("/serving/status").json()["models"]
            return (model["ready"], [agent["connected"] for agent in model["agents"]]) == (False, [False])

        eventually(away)
    finally:
        deployment.stop()


def test_the_log_has_one_line_for_each_request_and_no_prompt(standin: Serving, client: httpx.Client) -> None:
    forged = "/%0a2026-01-01 00:00:00 INFO forged%1b[31m"
    client.get(forged, headers={"x-request-id": "log-test-1"})
    client.post("/models/llama2", json={"inputs": "a private thing"}, headers={"x-request-id": "log-test-2"})
    client.get("/health/live")  # answered after the line of the request before it is written
    [line] = [line for line in standin.log.splitlines() if "log-test-1" in line]
    assert r"GET /\n2026-01-01 00:00:00 INFO forged\x1b[31m 404" in line
    assert "log-test-2 POST /models/llama2 200" in standin.log
    assert "private" not in standin.log


@pytest.mark.slow
def test_prompts_are_logged_where_the_operator_asks_for_it(tmp_path: Path) -> None:
    with serving(tmp_path, logging={"prompts": True}) as deployment:
        ask(deployment.client(), "one\nforged line", max_new_tokens=1)  # logged before it is answered
        assert r"asks llama2: one\nforged line" in deployment.log
