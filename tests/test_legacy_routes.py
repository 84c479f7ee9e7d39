"""``/models/M`` through real processes: answers against the stand-in's rule, streams against full answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from legacy_client import ask, event_text, events, line_text, lines, stream
from serving_processes import START_SECONDS, Serving

from agent.arithmetic_model import BEGIN, answer
from client.routes.legacy_formats import Events

PROMPTS = ["hi", "What is the capital of France?", "你好,世界", "🙂🙃 emoji", "def f(x):\n\treturn x", "é" * 40, " "]
SAMPLED = {"do_sample": True, "seed": 7, "temperature": 1.5, "top_k": 0, "max_new_tokens": 80}


def greedy(inputs: str, max_new_tokens: int) -> str:
    """The stand-in's answer of at most so many tokens, which are bytes."""
    return answer(inputs, max_new_tokens).encode()[:max_new_tokens].decode(errors="replace")


@pytest.mark.parametrize("inputs", PROMPTS)
def test_the_answer_is_that_of_the_model_in_one_line_of_utf8(client: httpx.Client, inputs: str) -> None:
    response = client.post("/models/llama2", json={"inputs": inputs})
    assert response.headers["content-type"] == "application/json"
    assert (
        response.content == b'{"generated_text": %b}\n' % json.dumps(greedy(inputs, 300), ensure_ascii=False).encode()
    )


@pytest.mark.parametrize("name", ["llama2", "internlm"])
def test_every_name_has_the_three_paths(client: httpx.Client, name: str) -> None:
    expected = greedy("hi", 9)
    body: dict[str, Any] = {"inputs": "hi", "parameters": {"max_new_tokens": 9, "return_full_text": False}}
    for path, stream_flag in [("", False), ("", "False"), ("", None), ("/generate", True), ("/generate", False)]:
        response = client.post(f"/models/{name}{path}", json={**body, "stream": stream_flag})
        assert response.json() == {"generated_text": expected}
    for path, stream_flag in [("", True), ("", "True"), ("/generate_stream", False), ("/generate_stream", True)]:
        response = client.post(f"/models/{name}{path}", json={**body, "stream": stream_flag})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert event_text(response.content) == expected


def test_an_event_is_the_documented_object(client: httpx.Client) -> None:
    content = stream(client, "hi", max_new_tokens=1, return_full_text=True)
    expected = json.dumps({"event": "message", "retry": 30000, "data": answer("hi", 1)})
    assert content.decode() == f"data: {expected}\r\n\r\n" * 2  # the only step, and the whole text


@pytest.mark.parametrize("protocol", ["sse", "lines"])
def test_a_stream_asks_proxies_not_to_hold_it_back(client: httpx.Client, protocol: str) -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 1, "return_protocol": protocol}}
    headers = client.post("/models/llama2/generate_stream", json=body).headers
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-store")


def test_a_line_is_the_documented_object(client: httpx.Client) -> None:
    content = stream(client, "hi", max_new_tokens=2, return_protocol="raw").decode()
    *steps, whole = content.splitlines(keepends=True)
    text = greedy("hi", 2)
    assert whole == f'data:{{"generated_text": "{text}"}}\n'
    apart = [f'data:{{"token": {{"text": "{text[i]}", "index": {i + 1}}}}}\n' for i in (0, 1)]
    joined = [f'data:{{"token": {{"text": "{text}", "index": 1}}}}\n']  # what a slow reader gets
    assert steps in (apart, joined)


@pytest.mark.parametrize("inputs", PROMPTS[:3])
@pytest.mark.parametrize(
    "parameters",
    [{}, {"ignore_eos": True, "max_new_tokens": 100}, SAMPLED, {"stop": ["a", "é中"]}, {**SAMPLED, "stop": ["好"]}],
    ids=str,
)
def test_streams_are_the_full_answer_byte_for_byte(
    client: httpx.Client, inputs: str, parameters: dict[str, Any]
) -> None:
    full = ask(client, inputs, **parameters)["generated_text"]
    *steps, whole = events(stream(client, inputs, **parameters))
    assert "".join(event["data"] for event in steps) == whole["data"] == full
    assert event_text(stream(client, inputs, return_full_text="False", **parameters)) == full
    content = stream(client, inputs, return_protocol="lines", **parameters)
    assert line_text(content) == full
    *steps, whole = lines(content)
    assert whole == {"generated_text": full}
    assert [line["token"]["index"] for line in steps] == list(range(1, len(steps) + 1))


def test_no_step_is_without_text_and_characters_come_whole(client: httpx.Client) -> None:
    content = stream(client, "中文🙂", ignore_eos=True, max_new_tokens=200, return_full_text=False)
    texts = [event["data"] for event in events(content)]
    assert all(texts)
    assert not any("\ufffd" in text for text in texts[:-1])  # the limit may cut the last character
    assert "\\u" not in content.decode()
    assert {len(character.encode()) for text in texts for character in text} == {1, 2, 3, 4}


@pytest.mark.parametrize("return_full_text", [True, False])
def test_an_empty_answer_streams_as_one(client: httpx.Client, return_full_text: bool) -> None:
    stop = [answer("hi", 1)]
    expected = [{"event": "message", "retry": 30000, "data": ""}] if return_full_text else []
    assert events(stream(client, "hi", stop=stop, return_full_text=return_full_text)) == expected


def test_a_quiet_stream_is_kept_open_by_a_comment_every_600_seconds() -> None:
    async def nothing() -> Any:
        for chunk in ():
            yield chunk

    response = Events().response(nothing())
    assert vars(response)["_ping_interval"] == 600


def test_a_name_with_a_template_answers_to_the_prompt_in_it(client: httpx.Client) -> None:
    templated = ask(client, "hi", name="internlm-chat", max_new_tokens=20)
    assert templated == {"generated_text": greedy("<|User|>:hi<eoh>\n<|Bot|>:", 20)}
    written_out = ask(client, "<s><|user|>{prompt}\n<|assistant|>", max_new_tokens=20)
    assert ask(client, "{prompt}", name="chat", max_new_tokens=20) == written_out


def test_left_out_the_answer_has_300_tokens_or_what_the_context_leaves(client: httpx.Client) -> None:
    assert ask(client, "hi", ignore_eos=True, details=True)["details"]["generated_tokens"] == 300
    nearly_full = "x" * (8192 - 1 - 5)  # and the begin token
    details = ask(client, nearly_full, ignore_eos=True, details=True)["details"]
    assert (details["generated_tokens"], details["finish_reason"]) == (5, "length")
    assert ask(client, nearly_full, ignore_eos=True, max_new_tokens=5)["generated_text"]


def test_stop_strings_end_the_answer_before_them(client: httpx.Client) -> None:
    text = answer("hello", 30)
    details = ask(client, "hello", stop=["not in it", text[4:6]], details=True)
    assert details["generated_text"] == text[: text.index(text[4:6])]
    assert details["details"]["finish_reason"] == "stop_sequence"


def test_end_tokens_end_an_answer_unless_ignored_or_too_early(client: httpx.Client) -> None:
    natural = ask(client, "hi", details=True)
    length = natural["details"]["generated_tokens"]
    assert natural["details"]["finish_reason"] == "eos_token"
    assert natural["details"]["tokens"][-1] | {"logprob": 0} == {
        "id": 257,
        "text": "</s>",
        "logprob": 0,
        "special": True,
    }
    assert natural["generated_text"] == answer("hi", 300)
    ignored = ask(client, "hi", details=True, ignore_eos=True, max_new_tokens=length + 9)
    assert ignored["details"]["generated_tokens"] == length + 9
    later = ask(client, "hi", details=True, min_new_tokens=length + 3)
    assert later["details"]["generated_tokens"] >= length + 3
    assert later["generated_text"].startswith(natural["generated_text"])


@pytest.mark.parametrize(
    "setting", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}, {"top_p": -1}, {"do_sample": False}]
)
def test_what_leaves_one_choice_is_greedy(client: httpx.Client, setting: dict[str, Any]) -> None:
    assert ask(client, "hi", **{**SAMPLED, **setting})["generated_text"] == greedy("hi", 80)


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": 8},
        {"temperature": 3.0},
        {"top_k": 2},
        {"top_p": 0.8},
        {"typical_p": 0.3},
        {"repetition_penalty": 5.0},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
    ],
    ids=str,
)
def test_every_sampling_field_has_an_effect_and_repeats_with_its_seed(
    client: httpx.Client, setting: dict[str, Any]
) -> None:
    base = {**SAMPLED, "ignore_eos": True, "max_new_tokens": 60}
    plain, first, second = (ask(client, "hi", **base), *(ask(client, "hi", **{**base, **setting}) for _ in range(2)))
    assert first == second != plain


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": 2**64 - 1},
        {"seed": 0},
        {"top_k": 2**31 - 1},
        {"temperature": 1e-300},
        {"temperature": 100, "top_k": -1},
        {"typical_p": 1e-300},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100, "frequency_penalty": -2, "presence_penalty": -2},
        {"stop": ["x" * 1024] * 16, "top_n_tokens": 20},
        {"min_new_tokens": 5, "max_new_tokens": 5},
        {"truncate": 2**31 - 1},
    ],
    ids=lambda setting: str(setting)[:40],
)
def test_the_ends_of_every_range_work(client: httpx.Client, setting: dict[str, Any]) -> None:
    result = ask(client, "hi", **{**SAMPLED, "max_new_tokens": 5, "ignore_eos": True, "details": True, **setting})
    assert result["details"]["generated_tokens"] == 5


def test_penalties_apply_to_greedy_too(client: httpx.Client) -> None:
    greedy = {"ignore_eos": True, "max_new_tokens": 60}
    assert ask(client, "hi", frequency_penalty=2.0, **greedy) != ask(client, "hi", **greedy)


def test_without_a_seed_answers_differ_and_the_reported_one_repeats_them(client: httpx.Client) -> None:
    sampled = {"do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 30, "details": True}
    first, second = ask(client, "hi", **sampled), ask(client, "hi", **sampled)
    assert first["generated_text"] != second["generated_text"]
    assert ask(client, "hi", seed=first["details"]["seed"], **sampled) == first


def test_details_tell_of_every_token(client: httpx.Client) -> None:
    asking = {"details": True, "decoder_input_details": True, "top_n_tokens": 3}
    result = ask(client, "hi", max_new_tokens=8, seed=5, **asking)
    details = result["details"]
    assert (details["generated_tokens"], details["seed"], details["finish_reason"]) == (8, 5, "length")
    assert [token["id"] for token in details["prefill"]] == [256, *b"hi"]
    assert details["prefill"][0] == {"id": 256, "text": "<s>", "logprob": None}
    assert all(token["logprob"] < 0 for token in details["prefill"][1:])
    assert bytes(token["id"] for token in details["tokens"]).decode(errors="replace") == result["generated_text"]
    for token, best in zip(details["tokens"], details["top_tokens"], strict=True):
        assert best[0]["id"] == token["id"]
        assert best[0]["logprob"] == pytest.approx(token["logprob"], abs=1e-5)
        assert [choice["logprob"] for choice in best] == sorted((choice["logprob"] for choice in best), reverse=True)
        assert [choice["id"] for choice in best] == [token["id"] + i for i in range(3)]  # by the stand-in's rule
        assert not any(choice["special"] for choice in best)


@pytest.mark.parametrize("asking", [{"details": True}, {"decoder_input_details": True}, {"top_n_tokens": 2}], ids=str)
def test_details_stand_only_where_asked_for(client: httpx.Client, asking: dict[str, Any]) -> None:
    assert set(ask(client, "hi", max_new_tokens=3)) == {"generated_text"}
    details = ask(client, "hi", max_new_tokens=3, seed=1, **asking)["details"]
    assert bool(details["prefill"]) == ("decoder_input_details" in asking)
    assert ("top_tokens" in details) == ("top_n_tokens" in asking)
    assert events(stream(client, "hi", max_new_tokens=3, seed=1, **asking))[-1]["details"] == details
    content = stream(client, "hi", max_new_tokens=3, seed=1, return_protocol="x", return_full_text=False, **asking)
    assert lines(content)[-1] == {"details": details}


def test_truncate_keeps_the_end_of_the_prompt(client: httpx.Client) -> None:
    cut = ask(client, "abcdefgh", truncate=3, max_new_tokens=4, decoder_input_details=True)
    begin, *kept = cut["details"]["prefill"]
    assert begin["id"] == BEGIN
    assert [token["text"] for token in kept] == ["g", "h"]
    assert ask(client, "x" * 9000, truncate="100", max_new_tokens=4)["generated_text"]


def test_two_hundred_clients_at_once_each_get_their_own_answer(standin: Serving) -> None:
    async def call(client: httpx.AsyncClient, number: int) -> str:
        inputs = f"client {number} 你好"
        parameters = {"return_full_text": False, "return_protocol": ["sse", "lines"][number % 2]}
        body = {"inputs": inputs, "stream": number % 4 < 2, "parameters": parameters}
        response = await client.post("/models/llama2", json=body)
        assert response.status_code == 200, response.text
        if number % 4 >= 2:
            return str(response.json()["generated_text"])
        return [event_text, line_text][number % 2](response.content)

    async def all_calls() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        settings = {"base_url": standin.url, "timeout": START_SECONDS, "limits": limits, "trust_env": False}
        async with httpx.AsyncClient(**settings) as client:
            return await asyncio.gather(*(call(client, number) for number in range(200)))

    assert asyncio.run(all_calls()) == [answer(f"client {number} 你好", 300) for number in range(200)]
