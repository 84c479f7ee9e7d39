"""Whatever the prompt, the limit and the stop strings: every route gives one text, whole and as a stream."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_client import ask, event_text, line_text, stream
from test_stop_checker import cut

from agent.arithmetic_model import ALPHABET, answer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)  # all of Unicode but half pairs
LENGTHS = st.integers(1, 40)


def patient(max_examples: int) -> settings:
    """However long an example takes."""
    return settings(max_examples=max_examples, deadline=None)


@st.composite
def stops(draw: st.DrawFn, inputs: str) -> list[str]:
    """Stop strings: some that the model will say, some with a wrong end, some that it never says."""
    said = answer(inputs, 40) or "x"
    start = draw(st.integers(0, len(said) - 1))
    piece = said[start : start + draw(st.integers(1, 5))]
    kinds = st.one_of(st.just(piece), st.just(piece + "?"), st.text(ALPHABET, min_size=1, max_size=3), TEXTS)
    return draw(st.lists(kinds, max_size=4))


def tgi(client: httpx.Client, inputs: str, **parameters: Any) -> str:
    """The full text."""
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    text: str = response.json()["generated_text"]
    return text


def tgi_stream(client: httpx.Client, inputs: str, **parameters: Any) -> tuple[str, str]:
    """What the tokens of a stream add up to, and the text in its last event."""
    response = client.post("/generate_stream", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    steps = [json.loads(event.removeprefix(b"data:")) for event in response.content.split(b"\n\n")[:-1]]
    return "".join(s["token"]["text"] for s in steps if not s["token"]["special"]), steps[-1]["generated_text"]


def openai(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """The choice of a whole answer."""
    response = client.post(path, json={"model": "llama2", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return dict(choice)


def openai_stream(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    response = client.post(path, json={"model": "llama2", "temperature": 0, "stream": True, **body})
    assert response.status_code == 200, response.text
    *chunks, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(chunk.removeprefix(b"data: "))["choices"][0] for chunk in chunks]


def check_openai(client: httpx.Client, inputs: str, full: str, length: int, stop: list[str]) -> None:
    """``full`` is what other protocols answer to the prompt; a chat's prompt is another one."""
    path, body = "/v1/completions", {"prompt": inputs, "max_tokens": length, "stop": stop}
    assert openai(client, path, **body)["text"] == full
    assert "".join(choice["text"] for choice in openai_stream(client, path, **body)) == full
    path, body = "/v1/chat/completions", {"max_tokens": length, "stop": stop, "logprobs": True}
    body["messages"] = [{"role": "user", "content": inputs}]
    whole = openai(client, path, **body)
    choices = openai_stream(client, path, **body)
    text = whole["message"]["content"]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text == cut(text, stop)[0]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert tokens == whole["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace") == text


def check_text(client: httpx.Client, inputs: str, length: int, stop: list[str]) -> None:
    parameters = {"max_new_tokens": length, "stop": stop}
    full = ask(client, inputs, **parameters)["generated_text"]
    assert full == cut(answer(inputs, length).encode()[:length].decode(errors="replace"), stop)[0]
    assert event_text(stream(client, inputs, return_full_text=False, **parameters)) == full
    assert line_text(stream(client, inputs, return_protocol="lines", **parameters)) == full
    assert tgi(client, inputs, **parameters) == full
    assert tgi_stream(client, inputs, **parameters) == (full, full)
    check_openai(client, inputs, full, length, stop)


@patient(12)
@given(st.data())
def test_a_text_is_one_text_on_every_route(client: httpx.Client, data: st.DataObject) -> None:
    inputs = data.draw(TEXTS)
    check_text(client, inputs, data.draw(LENGTHS), data.draw(stops(inputs)))


@pytest.mark.slow
@patient(200)
@given(st.data())
def test_many_texts_are_one_text_on_every_route(client: httpx.Client, data: st.DataObject) -> None:
    inputs = data.draw(TEXTS)
    check_text(client, inputs, data.draw(LENGTHS), data.draw(stops(inputs)))


@patient(8)
@given(TEXTS, LENGTHS, st.integers(0, 2**64 - 1))
def test_a_drawn_text_is_one_text_too(client: httpx.Client, inputs: str, length: int, seed: int) -> None:
    parameters = {"max_new_tokens": length, "seed": seed, "do_sample": True, "temperature": 3.0, "top_k": 50}
    full = ask(client, inputs, **parameters)["generated_text"]
    assert event_text(stream(client, inputs, return_full_text=False, **parameters)) == full
    assert tgi(client, inputs, **parameters) == full
    assert tgi_stream(client, inputs, **parameters) == (full, full)


@patient(15)
@given(TEXTS)
def test_the_prompt_comes_back_as_it_was(client: httpx.Client, inputs: str) -> None:
    assert tgi(client, inputs, max_new_tokens=3, return_full_text=True) == inputs + tgi(
        client, inputs, max_new_tokens=3
    )
