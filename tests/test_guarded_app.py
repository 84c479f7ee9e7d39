"""An app with all that can stand before its routes: API keys, CORS, deadlines; and what it says of itself meanwhile."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_processes import Serving, serving, standin_deployment

from client.server_app_post import create_app
from config.serving_config import ConfigError, load

KEYS = ["first-key-of-this-test", "second-key-of-this-test"]
PAGE = "https://chat.example.org"
TRACE = "0af7651916cd43dd8448eb211c80319c"
BODY = {"inputs": "hi", "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
GUARDED = ["/metrics", "/openapi.json", "/serving/get_bs", "/nothing", "/healthy", "/uid"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    write_keys(keys, *KEYS)
    server = {"api_key_file": str(keys), "cors_origins": [PAGE], "receive_timeout_seconds": 0.5}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_TRACES_EXPORTER", "console")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
        with serving(folder, server=server, logging={"format": "json"}, metrics={"prefix": "vllm:"}) as deployment:
            yield deployment


@pytest.fixture(scope="module")
def stranger(guarded: Serving) -> httpx.Client:
    """A client without a key."""
    return guarded.client()


@pytest.fixture(scope="module")
def friend(guarded: Serving) -> httpx.Client:
    return guarded.client(headers=bearer(KEYS[0]))


def write_keys(path: Path, *keys: str) -> None:
    """Put a new file with ``keys`` in the place of an old one, as an editor does."""
    fresh = path.with_name("fresh")
    fresh.write_text("# keys of a test\n\n" + "\n".join(keys) + "\n")
    fresh.chmod(0o600)
    fresh.replace(path)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_is_open(stranger: httpx.Client, path: str) -> None:
    assert stranger.get(path).status_code == 200


def test_the_description_says_which_operations_need_a_key(friend: httpx.Client) -> None:
    schema = friend.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"] == {"api_key": {"type": "http", "scheme": "bearer"}}
    needy = {
        path
        for path, methods in schema["paths"].items()
        if all(operation.get("security") == [{"api_key": []}] for operation in methods.values())
    }
    assert set(schema["paths"]) - needy == {"/health", "/health/live", "/health/ready", "/ui"}


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_everything_else_needs_a_key(stranger: httpx.Client, path: str, method: str) -> None:
    response = stranger.request(method, path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/models/llama2", {"error": "{}", "field": None}),
        ("/generate", {"error": "{}", "error_type": "unauthorized"}),
        (
            "/v1/completions",
            {"error": {"message": "{}", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}},
        ),
    ],
)
def test_a_refusal_is_in_the_words_of_the_protocol(stranger: httpx.Client, path: str, body: dict[str, Any]) -> None:
    message = "an API key is needed: Authorization: Bearer KEY"
    assert stranger.post(path, json=BODY).json() == json.loads(json.dumps(body).replace("{}", message))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_every_key_opens(stranger: httpx.Client, key: str, scheme: str) -> None:
    response = stranger.post("/models/llama2", json=BODY, headers={"Authorization": f"{scheme} {key}"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0].upper()}",
        f"Bearer {KEYS[0]} {KEYS[1]}",
        f"Basic {KEYS[0]}",
        KEYS[0],
        "Bearer",
        "Bearer #",
        b"Bearer \xff\xfe",
        "",
    ],
)
def test_nothing_else_does(stranger: httpx.Client, value: str | bytes) -> None:
    response = stranger.get("/metrics", headers={b"Authorization": value})
    assert response.status_code == 401
    assert response.json()["error"] in ("this API key is not known", "an API key is needed: Authorization: Bearer KEY")


def test_keys_can_be_changed_while_the_app_runs(guarded: Serving, stranger: httpx.Client) -> None:
    keys = guarded.config_path.parent / "keys"

    def status(key: str) -> int:
        return stranger.get("/metrics", headers=bearer(key)).status_code

    try:
        write_keys(keys, KEYS[1], "a-third-key-of-this-test")
        assert [status(key) for key in (*KEYS, "a-third-key-of-this-test")] == [401, 200, 200]
        write_keys(keys)
        assert status(KEYS[1]) == 200, "a file without keys changes nothing"
        assert "the API keys stay as they were" in guarded.log
        keys.unlink()
        assert status(KEYS[1]) == 200
    finally:
        write_keys(keys, *KEYS)
    assert [status(key) for key in (*KEYS, "a-third-key-of-this-test")] == [200, 200, 401]


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        ("a-key-that-is-long-enough", 0o640, "other users can read it"),
        ("", 0o600, "holds no key"),
        ("# only a comment", 0o600, "holds no key"),
        ("a-key-that-is-long-enough\nshort", 0o600, "key 2 is no key: it needs at least 16 characters"),
        ("a key with spaces in it", 0o600, "key 1 is no key"),
        ("k" * 70_000, 0o600, "holds 70000 bytes"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_a_file_that_keeps_no_keys_is_refused(tmp_path: Path, content: str | None, mode: int, problem: str) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_text(content)
        keys.chmod(mode)
    deployment = standin_deployment(tmp_path, server={"api_key_file": str(keys)})
    with pytest.raises(ConfigError, match=f"server.api_key_file: {keys}: {problem}") as refusal:
        create_app(load(deployment.config_path))
    assert not content or content not in str(refusal.value)


def test_a_page_from_a_known_place_may_call(friend: httpx.Client, stranger: httpx.Client) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = stranger.options("/models/llama2", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    answer = friend.post("/models/llama2", json=BODY, headers={"Origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    refused = stranger.post("/models/llama2", json=BODY, headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_no_other_page_may(friend: httpx.Client, client: httpx.Client) -> None:
    asked = {"Origin": "https://test", "Access-Control-Request-Method": "POST"}
    for response in (
        friend.options("/models/llama2", headers=asked),
        friend.post("/models/llama2", json=BODY, headers={"Origin": "https://test"}),
        client.options("/models/llama2", headers={**asked, "Origin": PAGE}),  # this app knows no page at all
        client.post("/models/llama2", json=BODY, headers={"Origin": PAGE}),
    ):
        assert "access-control-allow-origin" not in response.headers


def trickle(port: int, start: bytes) -> bytes:
    """What a socket gets that sends ``start`` and then a byte now and then."""
    received = b""
    with socket.create_connection(("127.0.0.1", port)) as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(0.05)
        connection.sendall(start)
        while True:
            try:
                if not (part := connection.recv(4096)):
                    break
                received += part
            except TimeoutError:
                connection.sendall(b"x")
    return received


def silence(port: int) -> bytes:
    """What a socket gets that sends nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        return b"".join(iter(lambda: connection.recv(4096), b""))


HEAD = b"POST /models/llama2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEYS[0].encode() + b"\r\n"
ANNOUNCED = HEAD + b"Content-Type: application/json\r\nContent-Length: 2000\r\n\r\n"


@pytest.mark.parametrize("start", [b"", HEAD + b"X-Slow: ", ANNOUNCED], ids=["nothing", "headers", "body"])
def test_a_request_that_comes_too_slowly_is_a_408(guarded: Serving, start: bytes) -> None:
    answer = trickle(guarded.port, start) if start else silence(guarded.port)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"] == "the request was not complete within 0.5 s"


def test_a_slow_body_after_its_answer_is_cut(guarded: Serving) -> None:
    refused = ANNOUNCED.replace(KEYS[0].encode(), b"unknown")
    head = trickle(guarded.port, refused).partition(b"\r\n")[0]
    assert head == b"HTTP/1.1 401 Unauthorized"


def test_the_deadline_begins_anew_with_each_request_and_spares_answers(guarded: Serving, friend: httpx.Client) -> None:
    long = {"inputs": "hi", "parameters": {"max_new_tokens": 1000, "ignore_eos": True, "return_full_text": False}}
    with friend.stream("POST", "/models/llama2/generate_stream", json=long) as response:
        assert sum(1 for _ in response.iter_lines()) > 0
    request = HEAD.replace(b"POST /models/llama2", b"GET /health") + b"\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as connection:
        for _ in range(3):
            connection.sendall(request[:20])
            connection.sendall(request[20:])
            answer = b""
            while b"ready" not in answer:
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")


def test_metrics_have_the_names_that_the_operator_chose(friend: httpx.Client) -> None:
    friend.post("/models/llama2", json=BODY)
    families = list(text_string_to_metric_families(friend.get("/metrics").text))
    assert families
    assert all(family.name.startswith("vllm:") for family in families)
    [tokens] = [f.samples for f in families if f.name == "vllm:generation_tokens"]
    assert tokens[0].name == "vllm:generation_tokens_total"
    assert tokens[0].value >= 3


def entries(guarded: Serving) -> list[dict[str, Any]]:
    return [json.loads(line) for line in guarded.log.splitlines()]


def test_every_line_of_the_log_is_an_object(guarded: Serving, friend: httpx.Client) -> None:
    forged = '/%0a{"message": "forged"}%e2%80%a8%1b[31m'
    friend.get(forged, headers={"x-request-id": "forger-1"})
    friend.post("/models/llama2", json=BODY, headers={"x-request-id": "asker-1"})
    friend.get("/health")  # answered after the line of the request before it is written
    found = {entry["request_id"]: entry for entry in entries(guarded) if "status" in entry}
    assert found["forger-1"]["path"] == '/\n{"message": "forged"}\u2028\x1b[31m'
    assert found["forger-1"]["status"] == 404
    assert found["asker-1"].items() >= {"level": "info", "logger": "client.http_edge", "method": "POST"}.items()
    [ended] = [e for e in entries(guarded) if e["request_id" if "finish_reason" in e else "level"] == "asker-1"]
    assert ended.items() >= {"finish_reason": "length", "output_tokens": 3}.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", ended["time"])
    assert guarded.log.isascii()


def test_a_request_leaves_a_span_in_the_trace_that_it_names(guarded: Serving, friend: httpx.Client) -> None:
    parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "traced-1"}
    friend.post("/models/llama2", json=BODY, headers=parent)
    assert guarded.app is not None
    guarded.app.wait_for('"gen_ai.request.id": "traced-1"')
    output = guarded.app.output
    guarded.app.wait_for('"name": "POST /models/{model}"')
    span = output[output.rindex('"name": "text_completion llama2"', 0, output.index("traced-1")) :]
    assert f'"trace_id": "0x{TRACE}"' in span[: span.index("attributes")]


@pytest.mark.parametrize("with_key", [True, False])
def test_a_port_for_all_needs_a_key_or_a_word(tmp_path: Path, with_key: bool) -> None:
    remote = {"host": "0.0.0.0", "allow_remote": True}
    path = standin_deployment(tmp_path, server=remote).config_path
    with pytest.raises(ConfigError, match=r"server.api_key_file: 0\.0\.0\.0 is not loopback"):
        load(path)
    way = {"api_key_file": "keys"} if with_key else {"allow_without_key": True}
    load(standin_deployment(tmp_path, server={**remote, **way}).config_path)
