"""Every refusal has its status, one JSON shape, a request id, and leaves the server as it was."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from legacy_client import ask
from serving_processes import Serving

from client.http_connection import MAX_HEADER_BYTES
from client.http_edge import HttpEdge
from client.routes import errors
from server.errors import GenerationFailed, InvalidRequest, NotServing, NoTurn, Overloaded, ShuttingDown

JSON = {"content-type": "application/json"}
PATHS = ["/models/llama2", "/models/internlm/generate", "/models/llama2/generate_stream"]


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body: dict[str, Any] = response.json()
    assert set(body) == {"error", "field"}
    assert body["error"]
    return body


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": "x" * 8192}, "inputs"),
        ({"inputs": "x", "parameters": 3}, "parameters"),
        ({"inputs": "x", "parameters": {"top_k": True}}, "top_k"),
        ({"inputs": "x", "parameters": {"stop": ["a", ""]}}, "stop"),
        ({"inputs": "x", "parameters": {"stop": ["a"] * 17}}, "stop"),
        ({"inputs": "x", "parameters": {"top_n_tokens": 21}}, "top_n_tokens"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 8191}}, "max_new_tokens"),
        ({"inputs": "x", "parameters": {"min_new_tokens": 4, "max_new_tokens": 3}}, "min_new_tokens"),
        ({"inputs": "x", "parameters": {"best_of": 3}}, "best_of"),
        ({"inputs": "x", "max_new_tokens": 3}, "max_new_tokens"),
        ({"inputs": "x", "stream": "perhaps"}, "stream"),
        ([], None),
        ("text", None),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(client: httpx.Client, path: str, body: object, field: str) -> None:
    answer = refusal(client.post(path, json=body), 422)
    assert answer["field"] == field
    assert (field or "the body") in answer["error"]


def test_a_long_unknown_name_is_cut(client: httpx.Client) -> None:
    answer = refusal(client.post(PATHS[0], json={"inputs": "x", "k" * 200_000: 1}), 422)
    assert answer["field"] == "k" * 100
    assert len(answer["error"]) < 200


def test_a_slash_too_many_is_a_404_and_not_a_redirect(client: httpx.Client) -> None:
    refusal(client.post(PATHS[0] + "/", json={"inputs": "x"}, headers={"host": "elsewhere"}), 404)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused_by_name(client: httpx.Client, number: str) -> None:
    body = '{"inputs": "x", "parameters": {"do_sample": true, "temperature": ' + number + "}}"
    assert refusal(client.post("/models/llama2", content=body, headers=JSON), 422)["field"] == "temperature"


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff\xfe\x00", b"{'inputs': 1}", b"[" * 200_000, b'{"inputs": ' + b"1" * 5000 + b"}"],
    ids=["cut", "bytes", "quotes", "deep", "digits"],
)
def test_what_is_no_json_is_a_400(client: httpx.Client, body: bytes) -> None:
    assert "JSON" in refusal(client.post("/models/llama2", content=body, headers=JSON), 400)["error"]


def test_half_a_surrogate_pair_is_refused(client: httpx.Client) -> None:
    response = client.post("/models/llama2", content=rb'{"inputs": "\ud83d"}', headers=JSON)
    assert refusal(response, 422)["field"] == "inputs"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
def test_another_content_type_is_a_415(client: httpx.Client, kind: str) -> None:
    response = client.post("/models/llama2", content=b'{"inputs": "x"}', headers={"content-type": kind})
    assert "application/json" in refusal(response, 415)["error"]


def test_json_with_a_charset_is_json(client: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/models/llama2", content=b'{"inputs": "x"}', headers=headers).status_code == 200


@pytest.mark.parametrize("suffix", ["", "/generate", "/generate_stream"])
def test_an_unknown_model_lists_the_served_ones(client: httpx.Client, suffix: str) -> None:
    error = refusal(client.post(f"/models/gpt{suffix}", json={"inputs": "x"}), 404)["error"]
    assert "llama2, internlm, internlm-chat, chat" in error


@pytest.mark.parametrize("path", ["/nothing", "/models", "/models/llama2/nothing", "/health/nothing", "/%0a%00"])
def test_an_unknown_path_is_a_404(client: httpx.Client, path: str) -> None:
    refusal(client.get(path), 404)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_another_method_is_a_405_that_names_the_right_one(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/models/llama2")
    refusal(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_large_body_is_a_413_before_it_is_read(client: httpx.Client) -> None:
    announced = client.post("/models/llama2", content=b"x" * ((2 << 20) + 1), headers=JSON)
    assert "2097152" in refusal(announced, 413)["error"]


def test_a_large_body_that_does_not_say_so_is_a_413(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * (1 << 19)

    refusal(client.post("/models/llama2", content=chunks(), headers=JSON), 413)


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES, 5 * MAX_HEADER_BYTES])
def test_large_headers_are_a_431(client: httpx.Client, size: int) -> None:
    refusal(client.get("/health", headers={"x-large": "y" * size}), 431)
    refusal(client.get("/health?" + "q" * MAX_HEADER_BYTES), 431)


def raw_exchange(port: int, *parts: bytes) -> tuple[bytes, dict[str, Any]]:
    """The status line and the body that a socket gets for ``parts``."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        with connection.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")
    return head.splitlines()[0], json.loads(body)


def test_headers_that_never_end_are_a_431(standin: Serving) -> None:
    status, body = raw_exchange(standin.port, b"GET /health HTTP/1.1\r\nx: ", *[b"y" * 4096] * 4)
    assert status.startswith(b"HTTP/1.1 431 ")
    assert str(MAX_HEADER_BYTES) in body["error"]


def test_what_is_no_http_is_a_400(standin: Serving) -> None:
    status, body = raw_exchange(standin.port, b"\x16\x03\x01 hello\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 400 ")
    assert body == {"error": "this is not an HTTP request", "field": None}


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 64])
def test_a_request_id_is_taken(client: httpx.Client, given: str) -> None:
    assert client.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a;b", "<script>"])
def test_a_request_id_that_could_do_harm_is_replaced(client: httpx.Client, given: str) -> None:
    made = {client.get("/health", headers={"x-request-id": given}).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert given not in made


def test_the_same_id_may_be_used_by_requests_at_the_same_time(standin: Serving) -> None:
    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=standin.url, trust_env=False) as client:
            calls = [client.post("/models/llama2", json={"inputs": i}, headers={"x-request-id": "me"}) for i in "ab"]
            return await asyncio.gather(*calls)

    assert [response.status_code for response in asyncio.run(both())] == [200, 200]


def test_refused_requests_leave_nothing_behind(standin: Serving, client: httpx.Client) -> None:
    for _ in range(50):
        client.post("/models/llama2", json={"inputs": "x" * 8192})
        client.post("/models/llama2", content=b"{", headers=JSON)
    assert 'num_requests_running{engine="0",model_name="llama2"} 0.0' in client.get("/metrics").text
    assert ask(client, "hi", max_new_tokens=2)


def answer_to(raised: Exception, path: str) -> httpx.Response:
    """What a client is told when the route of ``path`` raises this."""
    app = FastAPI()
    app.add_middleware(HttpEdge, max_body_bytes=100)
    errors.install(app)

    @app.get(path)
    async def fail() -> None:
        raise raised

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers={"x-request-id": "id-17"})

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("raised", "status", "retry_after"),
    [
        (RuntimeError("secret"), 500, None),
        (GenerationFailed("secret"), 500, None),
        (Overloaded("the queue is full"), 429, "1"),
        (NotServing("no agents"), 503, "5"),
    ],
)
def test_a_failure_of_ours_says_a_request_id_and_no_more(raised: Exception, status: int, retry_after: str) -> None:
    response = answer_to(raised, "/raise")
    body = refusal(response, status)
    assert response.headers["x-request-id"] == "id-17"
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text
    assert ("id-17" in body["error"]) == (status == 500)


@pytest.mark.parametrize(
    ("raised", "status", "kind"),
    [
        (RuntimeError("secret"), 424, "generation"),
        (GenerationFailed("secret"), 424, "generation"),
        (Overloaded("the queue is full"), 429, "overloaded"),
        (NotServing("no agents"), 503, "unavailable"),
        (InvalidRequest("is wrong", "prompt"), 422, "validation"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream", "/info"])
def test_text_generation_inference_has_its_own_words(raised: Exception, status: int, kind: str, path: str) -> None:
    response = answer_to(raised, path)
    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert set(response.json()) == {"error", "error_type"}
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Overloaded("the queue is full"), "queue_full"),
        (NoTurn("no turn came"), "queue_timeout"),
        (NotServing("no agents"), "agents_unavailable"),
        (ShuttingDown("the server is stopping"), "shutting_down"),
        (RuntimeError("secret"), None),
    ],
)
def test_openai_clients_are_told_a_code(raised: Exception, code: str | None) -> None:
    assert answer_to(raised, "/v1/chat/completions").json()["error"]["code"] == code


def test_openapi_tells_of_bodies_and_statuses(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {f"/models/{{model}}{suffix}" for suffix in ("", "/generate", "/generate_stream")} <= set(paths)
    for path, kinds in [
        ("/models/{model}", {"application/json", "text/event-stream", "text/plain"}),
        ("/models/{model}/generate", {"application/json"}),
        ("/models/{model}/generate_stream", {"text/event-stream", "text/plain"}),
    ]:
        post = paths[path]["post"]
        assert set(post["responses"]["200"]["content"]) == kinds
        assert {"400", "404", "413", "415", "422", "429", "431", "500", "503"} <= set(post["responses"])
        for status in ("404", "422"):
            assert "ErrorBody" in json.dumps(post["responses"][status])
        assert "LegacyRequest" in json.dumps(post["requestBody"])
