"""docs/errors.md: every row is produced, and no message in the sources is missing there."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from legacy_client import full_queue
from serving_processes import ROOT, Process, Serving, eventually, serving, standin_deployment
from test_http_errors import answer_to, raw_exchange

from client.http_connection import MAX_HEADER_BYTES
from server.errors import GenerationFailed

ROWS = {
    message: {int(status) for status in statuses.split(", ")}
    for statuses, message in re.findall(
        r"^\| ([\d, ]+) \| (.*?) \|", (ROOT / "docs" / "errors.md").read_text("utf-8"), re.M
    )
}
JSON = {"content-type": "application/json"}
LEGACY, TGI, STREAM = "/models/llama2", "/generate", "/generate_stream"
PARAMETERS: list[tuple[str, dict[str, Any], str]] = [
    (LEGACY, {"typo": 1}, "…: is not a field of this request"),
    (TGI, {"watermark": True}, "…: is not supported by this server; leave it out"),
    (LEGACY, {"temperature": -1}, "…: input should be …"),
    (TGI, {"top_k": "5"}, "…: input should be …"),
    (LEGACY, {"stop": [""]}, "…: string should have at least 1 character"),
    (TGI, {"stop": ["x" * 1025]}, "…: string should have at most 1024 characters"),
    (LEGACY, {"do_sample": "perhaps"}, '…: must be true or false (or "True" or "False")'),
    (LEGACY, {"top_p": "much"}, "…: must be a number"),
    (LEGACY, {"top_p": "1e999"}, "…: must be a finite number"),
    (LEGACY, {"top_k": 1.5}, "…: must be a whole number"),
    (LEGACY, {"seed": 2**64}, "…: must be at most …"),
    (TGI, {"seed": 2**64}, "…: must be at most …"),
    (TGI, {"top_n_tokens": 21}, "…: must be at most …"),
    (TGI, {"stop": ["x"] * 17}, "stop: has … texts, at most … are allowed"),
    (
        LEGACY,
        {"max_new_tokens": 9000},
        "max_new_tokens: … is more than the … that the context of … tokens leaves after the prompt's …",
    ),
    (LEGACY, {"min_new_tokens": 301}, "min_new_tokens: must be at most max_new_tokens, which is …"),
    (STREAM, {"best_of": 2, "do_sample": True}, "best_of: must be 1 in a stream"),
    (TGI, {"best_of": 2}, "best_of: above 1 needs do_sample: greedy answers are all the same"),
    (
        TGI,
        {"best_of": 2, "do_sample": True, "seed": 1},
        "seed: cannot be given with best_of above 1, whose answers have a seed each",
    ),
    (STREAM, {"decoder_input_details": True}, "decoder_input_details: cannot be had in a stream"),
    (TGI, {"grammar": {"type": "json", "value": "{"}}, "…: must be a JSON schema"),
    (TGI, {"grammar": {"type": "json", "value": 5}}, "…: must be a JSON schema, an object"),
    (
        TGI,
        {"grammar": {"type": "yaml", "value": ""}},
        "…: input tag … found using 'type' does not match any of the expected tags: …",
    ),
    (TGI, {"grammar": {"type": "regex", "value": "a" * 40_000}}, "grammar: has … bytes; at most … are taken"),
    (
        TGI,
        {"grammar": {"type": "regex", "value": "(a{500}){500}"}},
        "grammar: is too long: with its counted repetitions written out, it has more than … characters",
    ),
    (TGI, {"grammar": {"type": "regex", "value": "("}}, "grammar: cannot be used: …"),
    (STREAM, {"grammar": {"type": "regex", "value": r"[^\s\S]"}}, "grammar: describes no text at all"),
]
REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"content": b"{", "headers": JSON}, "the body is not JSON: … at character …"),
    ({"content": b"\xff", "headers": JSON}, "the body cannot be read as JSON"),
    ({"url": "/nothing"}, "there is nothing at this path; /openapi.json lists what there is"),
    ({"url": "/models/gpt", "json": {"inputs": "x"}}, "this model is not served; served are: …"),
    ({"method": "PUT"}, "this path does not take this method"),
    ({"content": b" " * (3 << 20), "headers": JSON}, "the body is larger than … bytes"),
    ({"content": b"x"}, "the body must be JSON, with Content-Type: application/json"),
    ({"headers": {"x": "y" * MAX_HEADER_BYTES}}, "the request line and headers are larger than … bytes"),
    ({"json": []}, "the body: must be a JSON object"),
    ({"json": {}}, "…: field required"),
    ({"json": {"inputs": "x" * 8192}}, "inputs: has … tokens; the context of … leaves no room for an answer"),
    (
        {"json": {"inputs": "x" * 8100, "parameters": {"min_new_tokens": 200}}},
        "min_new_tokens: is more than the … tokens that the answer may have",
    ),
]


def call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


HI: dict[str, Any] = {"model": "llama2", "prompt": "hi"}
TALK: dict[str, Any] = {"model": "llama2", "messages": [{"role": "user", "content": "hi"}]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPENAI: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {**HI, "service_tier": "flex"}, "…: can only be … on this server"),
    (COMPLETIONS, {**HI, "stream": True, "stream_options": {"include_obfuscation": True}}, "…: … is not a field of it"),
    (COMPLETIONS, {**HI, "stream_options": {}}, "stream_options: can only be given in a stream"),
    (COMPLETIONS, {**HI, "best_of": 2}, "best_of: must be what n is: this server does not choose among answers"),
    (
        COMPLETIONS,
        {**HI, "prompt": ["hi"] * 2, "n": 128},
        "…: asks for … answers in all, at most … are allowed",
    ),
    (COMPLETIONS, {**HI, "max_tokens": 0}, "max_tokens: must be at least 1, unless echo asks for the prompt"),
    (
        CHAT,
        {**TALK, "max_tokens": 1, "max_completion_tokens": 2},
        "max_tokens: is not what max_completion_tokens is; give one of them",
    ),
    (CHAT, {**TALK, "top_logprobs": 1}, "top_logprobs: needs logprobs: true"),
    (CHAT, {**TALK, "logit_bias": {"7": 1, "07": 1}}, "logit_bias: names a token twice"),
    (CHAT, {**TALK, "logit_bias": {"261": 1}}, "…: token id … is outside 0 … …"),
    (
        CHAT,
        {**TALK, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages: content must be a text or a list of text parts; nothing else can be read",
    ),
    (
        CHAT,
        {"model": "internlm", "messages": [{"role": "assistant", "content": "hi"}]},
        "messages: the model's chat template refuses them: …",
    ),
    (
        CHAT,
        {**TALK, "messages": [{"role": "assistant", "tool_calls": [call("[]")]}, *TALK["messages"]]},
        "messages: the arguments of the call … are no JSON object",
    ),
    (CHAT, {**TALK, "messages": [{"role": "user"}]}, "messages: a message needs content"),
    (
        CHAT,
        {**TALK, "messages": [{"role": "user", "content": "x", "tool_calls": [call("{}")]}]},
        "messages: only an assistant's message has tool_calls",
    ),
    (
        CHAT,
        {**TALK, "messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        "messages: only a tool's message has a tool_call_id",
    ),
    (CHAT, {**TALK, "tools": [TOOL, TOOL]}, "tools: two tools have the same name"),
    (CHAT, {**TALK, "tool_choice": "required"}, "tool_choice: demands a call, and there are no tools"),
    (
        CHAT,
        {**TALK, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "time"}}},
        "tool_choice: names …, which is not among the tools",
    ),
    (
        CHAT,
        {**TALK, "tools": [TOOL], "guided_regex": "a"},
        "…: cannot be given with tools that may be called: an answer has one form",
    ),
    (
        CHAT,
        {**TALK, "model": "internlm", "tools": [TOOL]},
        "tools: this model's chat template shows it no tools; leave them out",
    ),
    (
        COMPLETIONS,
        {**HI, "guided_regex": "a", "guided_choice": ["a"]},
        "…: cannot be given with …: an answer has one form",
    ),
    (
        COMPLETIONS,
        {**HI, "structured_outputs": {"json_object": False}},
        "structured_outputs: must have one of json, json_object, regex, choice and grammar",
    ),
    (
        COMPLETIONS,
        {**HI, "guided_regex": "a", "ignore_eos": True},
        "ignore_eos: cannot go with a constrained answer: only the end token can end one",
    ),
    ("/tokenize", {}, "prompt: must be given, or messages, and not both"),
    ("/tokenize", {"prompt": "\ud800"}, "…: is not valid Unicode text: it holds half a surrogate pair"),
    (
        "/v1/embeddings",
        {},
        "this server has no /v1/…; it has /v1/chat/completions, /v1/completions and /v1/models",
    ),
]
ELSEWHERE = {  # produced by a test of its own: the first four in test_guarded_app.py and test_tls.py, the others below
    "an API key is needed: Authorization: Bearer KEY",
    "this API key is not known",
    "the request was not complete within … s",
    "too many connections are open; try again later",
    "this is not an HTTP request",
    "has both Content-Length and Transfer-Encoding, so nobody knows where it ends",
    "… requests are waiting already; try again later",
    "the server could not finish this request; its log says why under request id …",
    "… is not ready yet: it waits for its agents at …",
    "waiting for …: agents at …",
    "inputs: has … tokens; this server takes …",
    "…: this model's graphs say nothing of a prompt's own tokens",
    "…: the prompt has … tokens; this model's graphs take a prompt whole, and score one of … at most",
    "max_new_tokens: … is more than the … that this server gives",
    "no turn came within … s; try again later",
    "the server is stopping",
    "the server is shutting down",
    "the server is shutting down and has not finished this answer",
    "messages: this model has no chat template",
}


def pattern(message: str) -> str:
    return ".+".join(map(re.escape, message.split("…")))


def check(response: httpx.Response, message: str) -> None:
    assert response.status_code in ROWS[message], response.text
    error = response.json()["error"]
    assert re.fullmatch(pattern(message), error["message"] if isinstance(error, dict) else error), response.text


def test_every_row_is_produced_here() -> None:
    assert {message for *_, message in (*PARAMETERS, *REQUESTS, *OPENAI)} | ELSEWHERE == set(ROWS)


@pytest.mark.parametrize(("path", "parameters", "message"), PARAMETERS, ids=lambda value: str(value)[:30])
def test_a_parameter(client: httpx.Client, path: str, parameters: dict[str, Any], message: str) -> None:
    check(client.post(path, json={"inputs": "x", "parameters": parameters}), message)


@pytest.mark.parametrize(("request_", "message"), REQUESTS, ids=lambda value: str(value)[:30])
def test_a_request(client: httpx.Client, request_: dict[str, Any], message: str) -> None:
    check(client.request(**{"method": "POST", "url": LEGACY, **request_}), message)


@pytest.mark.parametrize(("path", "body", "message"), OPENAI, ids=lambda value: str(value)[:30])
def test_a_request_of_the_openai_protocol(client: httpx.Client, path: str, body: dict[str, Any], message: str) -> None:
    check(client.post(path, content=json.dumps(body), headers=JSON), message)


def test_what_is_no_http(standin: Serving) -> None:
    assert raw_exchange(standin.port, b"hello\r\n\r\n")[1]["error"] == "this is not an HTTP request"


def test_a_request_with_two_lengths(standin: Serving) -> None:
    head = b"POST /models/llama2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, body = raw_exchange(standin.port, head + b"0\r\n\r\n")  # reads until the connection is closed
    assert status.startswith(b"HTTP/1.1 400 ")
    assert body["error"] == "has both Content-Length and Transfer-Encoding, so nobody knows where it ends"


def test_overload(slow_standin: Serving) -> None:
    client = slow_standin.client()
    with full_queue(client):
        check(client.post(LEGACY, json={"inputs": "x"}), "… requests are waiting already; try again later")


@pytest.mark.parametrize("path", [LEGACY, TGI])
def test_an_internal_error(path: str) -> None:
    message = "the server could not finish this request; its log says why under request id …"
    check(answer_to(GenerationFailed("secret"), path), message)


def without_chat_template(folder: Path) -> Path:
    """The stand-in's model folder as an export of a model that has no chat template."""
    shutil.copytree(ROOT / "config" / "standin", folder)
    (folder / "chat_template.jinja").unlink()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest["files"]["chat_template.jinja"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def with_capabilities(folder: Path, **capabilities: bool) -> str:
    """The stand-in as a model whose graphs can do less."""
    shutil.copytree(ROOT / "config/standin", folder)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["capabilities"] = capabilities
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return str(folder)


def test_an_app_without_agents(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path, [{}, {"path": str(without_chat_template(tmp_path / "model"))}])
    deployment.app = Process("client/server_app_post.py", "--config", deployment.config_path)
    try:
        deployment.app.wait_for("waiting for the agents")
        client = deployment.client()
        eventually(lambda: client.get("/health/live").is_success)
        check(client.post(LEGACY, json={"inputs": "x"}), "… is not ready yet: it waits for its agents at …")
        check(client.get("/health"), "waiting for …: agents at …")
        check(client.post(CHAT, json={**TALK, "model": "model1"}), "messages: this model has no chat template")
    finally:
        deployment.stop()


@pytest.mark.slow
def test_a_drain(tmp_path: Path) -> None:
    with (
        serving(tmp_path, [{"step_seconds": 0.02}], server={"drain_seconds": 2}) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        client = deployment.client()
        body = {"inputs": "x", "parameters": {"ignore_eos": True, "max_new_tokens": 4000}}
        unfinished = threads.submit(client.post, LEGACY, json=body)
        eventually(lambda: b'"data": 1}' in client.get("/serving/get_bs").content)
        assert deployment.app is not None
        deployment.app.send(signal.SIGTERM)
        eventually(lambda: client.get("/health").status_code == 503)
        check(client.get("/health"), "the server is shutting down")
        check(client.post(LEGACY, json={"inputs": "x"}), "the server is stopping")
        check(unfinished.result(), "the server is shutting down and has not finished this answer")


@pytest.mark.slow
def test_limits_of_the_engine(tmp_path: Path) -> None:
    limits = {"max_num_seqs": 1, "max_prompt_tokens": 300, "max_new_tokens": 200, "max_queue_seconds": 0.1}
    model = {"step_seconds": 0.02, "path": with_capabilities(tmp_path / "model", prompt_logits=False)}
    whole = {"names": ["whole"], "path": with_capabilities(tmp_path / "whole", cached_context=False)}
    with serving(tmp_path, [model, whole], limits=limits) as deployment, ThreadPoolExecutor() as threads:
        client = deployment.client()
        scored = {"inputs": "x", "parameters": {"details": True, "decoder_input_details": True}}
        check(client.post(LEGACY, json=scored), "…: this model's graphs say nothing of a prompt's own tokens")
        scored = {"prompt": "x", "echo": True, "logprobs": 1}
        check(
            client.post("/v1/completions", json={**scored, "model": "llama2"}),
            "…: this model's graphs say nothing of a prompt's own tokens",
        )
        scored = {"inputs": "x" * 257, "parameters": {"details": True, "decoder_input_details": True}}
        check(
            client.post("/models/whole", json=scored),
            "…: the prompt has … tokens; this model's graphs take a prompt whole, and score one of … at most",
        )
        check(client.post(LEGACY, json={"inputs": "x" * 300}), "inputs: has … tokens; this server takes …")
        body: dict[str, Any] = {"inputs": "x", "parameters": {"ignore_eos": True, "max_new_tokens": 201}}
        check(client.post(LEGACY, json=body), "max_new_tokens: … is more than the … that this server gives")
        body["parameters"]["max_new_tokens"] = 200
        running = threads.submit(client.post, LEGACY, json=body)
        eventually(lambda: b'"data": 1}' in client.get("/serving/get_bs").content)
        check(client.post(LEGACY, json=body), "no turn came within … s; try again later")
        streamed = client.post(COMPLETIONS, json={**HI, "stream": True})
        assert re.fullmatch(rb'data: \{"error":\{"message":"no turn came .*"queue_timeout"\}\}\n\n', streamed.content)
        assert running.result().status_code == 200


# What LLMServer says to programs that use it without the routes, which refuse the same or never ask for it.
NOT_OVER_HTTP = {
    "is empty",
    "the agents do not answer",
    "the server waits for its agents",
    "must be at least 1",
    "holds an empty string",
    "is no JSON that can be written down: …",
    "needs a model with an end token, and this one has none",
    "cannot be served: the library does not read this model's tokenizer: …",
    "takes … s to compile; at most … s are given to one",
}
# What raises or makes what a client is told, and which of its arguments is the message.
TELLS = {
    "InvalidRequest": 0,
    "ContextExceeded": 0,
    "NoSuchRoute": 0,
    "UnknownModel": 0,
    "Overloaded": 0,
    "NoTurn": 0,
    "NotServing": 0,
    "ShuttingDown": 0,
    "PydanticCustomError": 1,
}
TELLS |= {"GrammarError": 0, "HTTPException": 1, "Problem": "message"}


def messages(tree: ast.AST) -> Iterator[str]:
    """What a source tells clients; what is filled in is ``…``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in TELLS:
            continue
        place = TELLS[node.func.id]
        values = [keyword.value for keyword in node.keywords if keyword.arg == place]
        told = node.args[place] if isinstance(place, int) else values[0]
        if isinstance(told, ast.Constant):
            yield told.value
        elif isinstance(told, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in told.values)


@pytest.mark.parametrize("package", ["client", "server"])
def test_no_message_is_missing(package: str) -> None:
    known = [message for row in ROWS for message in (row, row.partition(": ")[2])]
    for path in sorted((ROOT / package).rglob("*.py")):
        for told in set(messages(ast.parse(path.read_text(encoding="utf-8")))) - NOT_OVER_HTTP:
            assert any(re.fullmatch(pattern(told), message) for message in known), f"docs/errors.md lacks {told!r}"
