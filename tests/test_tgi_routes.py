"""The routes of Text Generation Inference, through real processes: shapes, sampling rules, streams, refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from legacy_client import full_queue
from serving_processes import Serving, eventually

from agent.arithmetic_model import BEGIN, END, answer
from client.schemas.tgi import TgiParameters, TgiRequest
from config.serving_config import LimitsConfig
from config.version import __version__

STREAMS = [("/", True), ("/generate_stream", False), ("/generate_stream", True)]


def ask(client: httpx.Client, inputs: str, **parameters: Any) -> dict[str, Any]:
    """The full answer."""
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def stream(client: httpx.Client, inputs: str, **parameters: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    response = client.post("/generate_stream", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return events(response)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON objects of a stream; anything else in it is an error."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *messages, rest = response.content.split(b"\n\n")
    assert rest == b""
    assert all(message.startswith(b"data:{") for message in messages)
    return [json.loads(message.removeprefix(b"data:")) for message in messages]


def together(steps: list[dict[str, Any]]) -> str:
    """What the tokens of a stream add up to."""
    return "".join(step["token"]["text"] for step in steps if not step["token"]["special"])


def refusal(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == kind
    error: str = body["error"]
    return error


def test_the_smallest_request_is_greedy_and_has_100_tokens(client: httpx.Client) -> None:
    assert ask(client, "hi") == {"generated_text": answer("hi", 100)}
    details = ask(client, "a", details=True)["details"]
    assert details["generated_tokens"] <= 100
    left = ask(client, "x" * (8192 - 1 - 5), details=True)["details"]
    assert left["generated_tokens"] <= 5


def test_the_root_answers_with_a_list_or_a_stream(client: httpx.Client) -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 5}}
    assert client.post("/", json=body).json() == [{"generated_text": answer("hi", 5)}]
    assert client.post("/", json={**body, "stream": None}).json() == [{"generated_text": answer("hi", 5)}]
    assert client.post("/generate", json={**body, "stream": True}).json() == {"generated_text": answer("hi", 5)}
    for path, flag in STREAMS:
        steps = events(client.post(path, json={**body, "stream": flag}))
        assert together(steps) == steps[-1]["generated_text"] == answer("hi", 5)


def test_an_event_is_the_documented_object(client: httpx.Client) -> None:
    first, last = stream(client, "hi", max_new_tokens=2, details=True, seed=3)
    logprob = first["token"].pop("logprob")
    assert logprob < 0
    token = {"id": ord("d"), "text": "d", "special": False}
    assert first == {"index": 1, "token": token, "top_tokens": [], "generated_text": None, "details": None}
    assert (last["index"], last["generated_text"]) == (2, "dg")
    assert last["details"] == {"finish_reason": "length", "generated_tokens": 2, "seed": 3, "input_length": 3}


def test_without_details_the_last_event_has_none(client: httpx.Client) -> None:
    assert stream(client, "hi", max_new_tokens=2)[-1]["details"] is None


def test_the_end_token_is_an_event_and_special(client: httpx.Client) -> None:
    steps = stream(client, "c", max_new_tokens=300, details=True)
    last = steps[-1]
    assert last["token"] | {"logprob": 0} == {"id": END, "text": "</s>", "logprob": 0, "special": True}
    assert last["details"]["finish_reason"] == "eos_token"
    assert together(steps) == last["generated_text"] == answer("c", 300)
    assert [step["index"] for step in steps] == list(range(1, last["details"]["generated_tokens"] + 1))


def test_a_character_of_several_tokens_stands_in_its_last(client: httpx.Client) -> None:
    steps = stream(client, "hi", max_new_tokens=11)
    texts = [step["token"]["text"] for step in steps]
    assert "".join(texts) == "dgvsykж好"
    assert texts[-5:] == ["", "ж", "", "", "好"]


def test_a_character_that_the_limit_cuts_is_in_the_stream_as_in_the_answer(client: httpx.Client) -> None:
    full = ask(client, "hi", max_new_tokens=7)["generated_text"]
    assert full == "dgvsyk\ufffd"
    assert together(stream(client, "hi", max_new_tokens=7)) == full


def test_what_an_end_token_brings_out_is_not_special(client: httpx.Client) -> None:
    text = answer("c", 300)
    held_back = [text[-1] + "and more"]  # the answer ends where this stop string might begin
    *_, before, last = stream(client, "c", max_new_tokens=300, stop=held_back)
    assert before["token"]["text"] == ""
    assert (last["token"]["id"], last["token"]["text"], last["token"]["special"]) == (END, text[-1], False)
    assert last["generated_text"] == text


def test_full_text_begins_with_the_prompt(client: httpx.Client) -> None:
    setting = {"max_new_tokens": 4, "return_full_text": True}
    assert ask(client, "hi", **setting)["generated_text"] == "hi" + answer("hi", 4)
    steps = stream(client, "hi", **setting)
    assert steps[-1]["generated_text"] == "hi" + answer("hi", 4)
    assert together(steps) == answer("hi", 4)


@pytest.mark.parametrize(
    "setting",
    [{"do_sample": True}, {"temperature": 1.0}, {"top_k": 40}, {"top_p": 0.999}, {"typical_p": 0.999}],
    ids=str,
)
def test_sampling_is_on_where_any_of_its_fields_is_given(client: httpx.Client, setting: dict[str, Any]) -> None:
    hot = {"max_new_tokens": 60, "seed": 4, "repetition_penalty": 1.0}
    first, second = (ask(client, "hi", **hot, **setting)["generated_text"] for _ in range(2))
    assert first == second
    assert not first.startswith(answer("hi", 20))


def test_penalties_do_not_turn_sampling_on(client: httpx.Client) -> None:
    plain, first, second = (
        ask(client, "hi", max_new_tokens=60, seed=seed, frequency_penalty=penalty)
        for seed, penalty in ((1, 0.0), (1, 2.0), (2, 2.0))
    )
    assert first == second != plain


def test_details_tell_of_every_token(client: httpx.Client) -> None:
    result = ask(client, "hi", max_new_tokens=3, details=True, decoder_input_details=True, top_n_tokens=2, seed=9)
    details = result["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 3, 9)
    assert [token["id"] for token in details["prefill"]] == [BEGIN, *b"hi"]
    assert [token["text"] for token in details["tokens"]] == ["d", "g", "v"]
    assert [[choice["id"] for choice in best] for best in details["top_tokens"]] == [[t, t + 1] for t in b"dgv"]
    assert "best_of_sequences" not in details
    steps = stream(client, "hi", max_new_tokens=3, top_n_tokens=2)
    assert [[choice["id"] for choice in step["top_tokens"]] for step in steps] == [[t, t + 1] for t in b"dgv"]
    logprobs = [token["logprob"] for token in details["tokens"]]
    assert [step["token"]["logprob"] for step in steps] == pytest.approx(logprobs, abs=1e-5)


def test_top_tokens_do_not_ask_for_details(client: httpx.Client) -> None:
    assert set(ask(client, "hi", max_new_tokens=2, top_n_tokens=2)) == {"generated_text"}
    assert ask(client, "hi", max_new_tokens=2, decoder_input_details=True)["details"]["prefill"]


def test_best_of_answers_with_the_likeliest_and_each_seed_repeats_its_own(client: httpx.Client) -> None:
    sampled = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12, "details": True}
    result = ask(client, "hi", best_of=4, **sampled)
    others = result["details"].pop("best_of_sequences")
    assert len(others) == 3
    total = [sum(token["logprob"] for token in one["tokens"]) for one in (result["details"], *others)]
    assert total[0] == max(total)
    assert len({one["seed"] for one in (result["details"], *others)}) == 4
    assert ask(client, "hi", seed=result["details"]["seed"], **sampled) == result
    again = ask(client, "hi", seed=others[0]["seed"], **sampled)
    assert again["generated_text"] == others[0]["generated_text"]
    assert set(ask(client, "hi", best_of=2, do_sample=True, max_new_tokens=2)) == {"generated_text"}


def test_truncate_keeps_the_end_of_the_prompt(client: httpx.Client) -> None:
    details = ask(client, "abcdefgh", truncate=3, max_new_tokens=1, decoder_input_details=True)["details"]
    assert [token["text"] for token in details["prefill"]] == ["<s>", "g", "h"]


def test_a_stop_string_ends_the_answer_before_it(client: httpx.Client) -> None:
    text = answer("hello", 30)
    result = ask(client, "hello", stop=["not in it", text[4:6]], details=True)
    assert result["generated_text"] == text[: text.index(text[4:6])]
    assert result["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 8192}, "max_new_tokens"),
        ({"truncate": 0}, "truncate"),
        ({"do_sample": "True"}, "do_sample"),
        ({"stop": "end"}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 129, "do_sample": True}, "best_of"),
        ({"watermark": True}, "watermark"),
        ({"adapter_id": "one"}, "adapter_id"),
        ({"grammar": {"type": "json", "value": 5}}, "grammar"),
        ({"ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_name(
    client: httpx.Client, path: str, parameters: dict[str, Any], field: str
) -> None:
    response = client.post(path, json={"inputs": "hi", "parameters": parameters})
    assert refusal(response, 422, "validation").startswith(f"{field}: ")


def test_best_of_and_a_seed_contradict_each_other(client: httpx.Client) -> None:
    body = {"inputs": "hi", "parameters": {"best_of": 2, "do_sample": True, "seed": 1}}
    assert refusal(client.post("/generate", json=body), 422, "validation").startswith("seed: ")


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}], ids=str)
def test_what_a_stream_cannot_have_is_refused_before_it_begins(
    client: httpx.Client, parameters: dict[str, Any]
) -> None:
    body = {"inputs": "hi", "parameters": parameters}
    for path, flag in STREAMS:
        error = refusal(client.post(path, json={**body, "stream": flag}), 422, "validation")
        assert error.startswith(f"{next(iter(parameters))}: ")
    assert client.post("/", json=body).status_code == 200


@pytest.mark.parametrize("inputs", [None, "", "x" * 8192])
def test_a_prompt_is_a_text_that_fits(client: httpx.Client, inputs: str | None) -> None:
    assert refusal(client.post("/", json={"inputs": inputs}), 422, "validation").startswith("inputs: ")


@pytest.mark.parametrize(
    ("content", "kind", "status"), [(b"{", "application/json", 400), (b'{"inputs": "hi"}', "text/plain", 415)]
)
def test_what_is_no_json_is_refused(client: httpx.Client, content: bytes, kind: str, status: int) -> None:
    for path in ("/", "/generate", "/generate_stream"):
        refusal(client.post(path, content=content, headers={"content-type": kind}), status, "validation")


def test_null_is_left_out_and_what_says_nothing_is_ignored() -> None:
    nothing = dict.fromkeys(TgiParameters.model_fields) | {"watermark": False, "adapter_id": "", "ignore_eos": None}
    request = TgiRequest.model_validate({"inputs": "hi", "parameters": nothing, "model": None})
    assert request.parameters == TgiParameters()
    assert request.parameters.generation_params(LimitsConfig(), stream=False).sampling.temperature == 0


def test_the_model_and_its_limits_are_told(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert (info["model_id"], info["version"], info["model_pipeline_tag"]) == ("llama2", __version__, "text-generation")
    assert (info["max_input_tokens"], info["max_total_tokens"], info["max_stop_sequences"]) == (8191, 8192, 16)


def test_a_full_queue_is_overload(slow_standin: Serving) -> None:
    client = slow_standin.client()
    with full_queue(client):
        for path in ("/", "/generate", "/generate_stream"):
            refused = client.post(path, json={"inputs": "hi"})
            assert refusal(refused, 429, "overloaded")
            assert refused.headers["retry-after"] == "1"
    eventually(lambda: client.post("/generate", json={"inputs": "hi"}).status_code == 200)
