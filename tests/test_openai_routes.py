"""The routes of the OpenAI protocol, byte by byte: shapes, stop strings across tokens, streams that end in an error."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from legacy_client import full_queue
from serving_processes import Serving, eventually

from agent.arithmetic_model import BEGIN, answer
from client.schemas.openai_chat import ChatRequest
from client.schemas.openai_generation import GenerationBody
from config.serving_config import LimitsConfig

HI = [{"role": "user", "content": "hi"}]


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """The whole answer."""
    response = client.post(path, json={"model": "llama2", **body})
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def stream(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    response = client.post(path, json={"model": "llama2", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_a_chat_is_the_documented_object(client: httpx.Client) -> None:
    body = ask(client, "/v1/chat/completions", messages=HI, max_tokens=2, temperature=0)
    text = body["choices"][0]["message"]["content"]
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    usage = body.pop("usage")
    assert body == {
        "object": "chat.completion",
        "model": "llama2",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
    }
    assert usage["completion_tokens"] == 2
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}


def test_cached_tokens_are_told(client: httpx.Client) -> None:
    prompt = "a prompt that fills several blocks of the cache, and that nothing else asks for"
    first, second = (ask(client, "/v1/completions", prompt=prompt, max_tokens=1)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
    salted = ask(client, "/v1/completions", prompt=prompt, max_tokens=1, cache_salt="other")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_completion_stream_puts_the_prompt_in_front(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": "hi", "max_tokens": 9, "temperature": 0, "echo": True, "logprobs": 1}
    choice = ask(client, "/v1/completions", **asked)["choices"][0]
    assert choice["text"] == "hi" + answer("hi", 7) + "\ufffd"  # the ninth token begins a character
    chunks = [chunk["choices"][0] for chunk in stream(client, "/v1/completions", **asked)]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name, values in choice["logprobs"].items():
        streamed = [value for chunk in chunks for value in chunk["logprobs"][name]]
        if name in ("tokens", "text_offset"):
            assert streamed == values
        assert len(streamed) == len(values) == 3 + 9
    assert choice["logprobs"]["tokens"][:3] == ["<s>", "h", "i"]
    assert choice["logprobs"]["text_offset"][:4] == [0, 0, 1, 2]
    assert "bytes:\\xd0" in choice["logprobs"]["tokens"]


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_stop_string_across_tokens_is_never_seen_not_even_in_part(client: httpx.Client, logprobs: bool) -> None:
    asked: dict[str, Any] = {"messages": HI, "max_tokens": 40, "temperature": 0}
    text = ask(client, "/v1/chat/completions", **asked)["choices"][0]["message"]["content"]
    for begin in range(1, 20, 3):
        stop = text[begin : begin + 4]
        kept = text[: text.index(stop)]
        stopped = {**asked, "stop": [stop, "not in it"], "logprobs": logprobs}
        whole = ask(client, "/v1/chat/completions", **stopped)["choices"][0]
        assert (whole["message"]["content"], whole["finish_reason"]) == (kept, "stop")
        chunks = [chunk["choices"][0] for chunk in stream(client, "/v1/chat/completions", **stopped)]
        seen = ""
        for chunk in chunks:
            seen += chunk["delta"].get("content", "")
            assert kept.startswith(seen)
        assert (seen, chunks[-1]["finish_reason"]) == (kept, "stop")
        if logprobs:
            told = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
            assert b"".join(bytes(entry["bytes"]) for entry in told).decode() == kept
            assert [entry["bytes"] for entry in whole["logprobs"]["content"]] == [entry["bytes"] for entry in told]


def test_a_stop_may_be_one_text_or_a_token(client: httpx.Client) -> None:
    text = answer("hi", 6)
    greedy: dict[str, Any] = {"prompt": "hi", "temperature": 0, "max_tokens": 6}
    for stop in ({"stop": text[3]}, {"stop_token_ids": [ord(text[3])]}):
        choice = ask(client, "/v1/completions", **greedy, **stop)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[:3], "stop")


def test_a_bias_of_minus_100_bans_a_token(client: httpx.Client) -> None:
    greedy: dict[str, Any] = {"prompt": "hi", "temperature": 0, "max_tokens": 1}
    first = answer("hi", 1)
    banned = ask(client, "/v1/completions", **greedy, logit_bias={str(ord(first)): -100})["choices"][0]["text"]
    assert banned != first


def test_each_name_has_its_chat_template(client: httpx.Client) -> None:
    def prompt(name: str) -> str:
        tokens = client.post("/tokenize", json={"model": name, "messages": HI}).json()["tokens"]
        text: str = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        return text

    assert prompt("internlm") == "<s><|User|>:hi<eoh>\n<|Bot|>:"
    assert prompt("llama2") == "<s><|user|>hi\n<|assistant|>"


def test_content_may_be_parts_and_a_developer_speaks_as_the_system(client: httpx.Client) -> None:
    plain = [{"role": "system", "content": "Be kind."}, *HI]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None},
    ]
    first, second = (client.post("/tokenize", json={"messages": messages}).json() for messages in (plain, parts))
    assert first == second


def test_tokens_there_and_back(client: httpx.Client) -> None:
    body = client.post("/tokenize", json={"prompt": "é好"}).json()
    assert body == {"count": 6, "max_model_len": 8192, "tokens": [BEGIN, *"é好".encode()]}
    assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "<s>é好"}
    bare = client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == list(b"hi")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("top_p", 0), ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 129), ("max_tokens", 0),
        ("stop", [""]), ("stop", ["x"] * 17), ("top_logprobs", 21), ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("stop_token_ids", [999]), ("seed", 2**64), ("priority", 1000), ("cache_salt", "x" * 257), ("tools", [{}]),
        ("response_format", {"type": "yaml"}), ("guided_regex", "("), ("chat_template", "{{ 1 }}"), ("store", True),
        ("messages", []),
        ("messages", [{"role": "robot", "content": "hi"}]),
        ("service_tier", "flex"), ("verbosity", "low"), ("reasoning_effort", "high"),
        ("skip_special_tokens", False), ("skip_special_tokens", 1), ("add_generation_prompt", False),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(client: httpx.Client, field: str, value: object) -> None:
    body = {"model": "llama2", "messages": HI, "logprobs": True, field: value}
    error = refusal(client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")
    assert error["type"] == "invalid_request_error"


def test_what_says_nothing_is_ignored_and_the_defaults_are_openais() -> None:
    nothing = dict.fromkeys(GenerationBody.model_fields) | {"store": False, "tools": [], "n": None}
    harmless = {
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "modalities": ["text"],
        "service_tier": "auto",
        "verbosity": "medium",
        "reasoning_effort": "none",
        "prompt_cache_retention": "in_memory",
        "skip_special_tokens": True,
        "add_generation_prompt": True,
        "user": "me",
        "metadata": {"a": 1},
    }
    body = ChatRequest.model_validate({**nothing, **harmless, "model": "llama2", "messages": HI})
    params = body.generation_params(LimitsConfig())
    sampling = params.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, params.max_new_tokens) == (1.0, 1.0, 0, None)


def test_one_refused_prompt_refuses_the_batch_and_nothing_goes_on(client: httpx.Client) -> None:
    body = {"model": "llama2", "prompt": ["hi", [300]], "max_tokens": 4000, "ignore_eos": True}
    assert refusal(client.post("/v1/completions", json=body), 400)["param"] == "prompt"


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_that_nobody_reads_any_more_ends(slow_standin: Serving, n: int) -> None:
    client = slow_standin.client()
    body = {"model": "llama2", "prompt": "hi", "n": n, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_raw())
    eventually(lambda: b'"data": 0}' in client.get("/serving/get_bs").content)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_full_queue_is_a_rate_limit(slow_standin: Serving, path: str) -> None:
    client = slow_standin.client()
    with full_queue(client):
        asked = {"messages": HI} if "chat" in path else {"prompt": "hi"}
        response = client.post(path, json={"model": "llama2", **asked})
        error = refusal(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_exceeded", "queue_full")
        assert response.headers["retry-after"] == "1"
