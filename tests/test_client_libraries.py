"""The libraries that people reach such a server with, as they are published: huggingface_hub, httpx-sse, sseclient."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import sseclient
from default_model import PROMPTS, default_model
from httpx_sse import connect_sse
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError
from legacy_client import full_queue
from serving_processes import Serving, serving

from agent.arithmetic_model import answer


@pytest.fixture(scope="module")
def default_deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Agents and app on the default model."""
    model = {"path": str(default_model("float32")), "target": "cpu", "cache_memory": "64MiB"}
    with serving(tmp_path_factory.mktemp("libraries"), [model]) as started:
        yield started


@pytest.fixture(params=["standin", pytest.param("default_deployment", marks=pytest.mark.slow)])
def deployment(request: pytest.FixtureRequest) -> Serving:
    """The stand-in, and in the long run of the tests the default model too."""
    started: Serving = request.getfixturevalue(request.param)
    return started


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "蓝"]}, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


def test_hugging_face_gets_json_of_a_schema_whole_streamed_and_in_company(deployment: Serving) -> None:
    client, grammar = InferenceClient(model=deployment.url), {"type": "json", "value": PERSON}

    def asked(prompt: str, **settings: Any) -> str:
        answer = client.text_generation(prompt, max_new_tokens=400 if settings else 40, **settings)
        assert isinstance(answer, str)
        return answer

    prompts = [f"{prompt} As JSON: " for prompt in PROMPTS[::10]]
    plain, formed = [asked(prompt) for prompt in prompts], [asked(prompt, grammar=grammar) for prompt in prompts]
    for prompt, text in zip(prompts, formed, strict=True):
        jsonschema.validate(json.loads(text), PERSON)
        *_, last = client.text_generation(prompt, max_new_tokens=400, grammar=grammar, stream=True, details=True)
        assert last.generated_text == text
    with ThreadPoolExecutor(2 * len(prompts)) as threads:
        together = [threads.submit(asked, prompt) for prompt in prompts]
        together += [threads.submit(asked, prompt, grammar=grammar) for prompt in prompts]
        assert [one.result() for one in together] == plain + formed


def test_hugging_face_generates_text_whole_and_streamed(deployment: Serving) -> None:
    client = InferenceClient(model=deployment.url)
    for prompt in PROMPTS[::8]:
        whole = client.text_generation(prompt, max_new_tokens=16)
        detailed = client.text_generation(prompt, max_new_tokens=16, details=True, decoder_input_details=True)
        assert detailed.generated_text == whole
        details = detailed.details
        assert details is not None
        assert details.generated_tokens == len(details.tokens) <= 16
        assert details.finish_reason == ("length" if details.generated_tokens == 16 else "eos_token")
        steps = list(client.text_generation(prompt, max_new_tokens=16, details=True, stream=True))
        assert "".join(step.token.text for step in steps if not step.token.special) == whole
        assert [step.token.id for step in steps] == [token.id for token in details.tokens]
        last = steps[-1]
        assert last.generated_text == whole
        assert last.details is not None
        assert last.details.input_length == len(details.prefill)
        assert (last.details.finish_reason, last.details.generated_tokens) == (details.finish_reason, len(steps))
        assert client.text_generation(prompt, max_new_tokens=16, return_full_text=True) == prompt + whole
        ends = 1 if details.finish_reason == "eos_token" else 0  # TGI shows the end token to who asks for no details
        assert (
            "".join(list(client.text_generation(prompt, max_new_tokens=16, stream=True))[: len(steps) - ends]) == whole
        )


def test_hugging_face_hands_every_parameter_on(deployment: Serving) -> None:
    client = InferenceClient(model=deployment.url)
    setting: dict[str, Any] = {
        "do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95, "typical_p": 0.95,
        "repetition_penalty": 1.1, "frequency_penalty": 0.1, "max_new_tokens": 12, "stop": ["never in it"],
        "truncate": 50, "top_n_tokens": 3, "watermark": False, "details": True,
    }  # fmt: skip
    first = client.text_generation("The capital of France is", seed=11, **setting)
    assert client.text_generation("The capital of France is", seed=11, **setting) == first
    assert first.details is not None
    assert first.details.top_tokens is not None
    assert [len(best) for best in first.details.top_tokens] == [3] * first.details.generated_tokens
    best = client.text_generation("The capital of France is", best_of=3, **setting).details
    assert best is not None
    assert best.best_of_sequences is not None
    assert len(best.best_of_sequences) == 2


def test_hugging_face_chats(deployment: Serving) -> None:
    client = InferenceClient(base_url=f"{deployment.url}/v1")
    talk: dict[str, Any] = {"model": "llama2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
    whole = client.chat_completion(**talk, temperature=0).choices[0].message.content
    assert whole
    parts = client.chat_completion(**talk, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    formed = client.chat_completion(**{**talk, "max_tokens": 400}, temperature=0, response_format=form)
    jsonschema.validate(json.loads(formed.choices[0].message.content or ""), PERSON)


def test_hugging_face_chats_with_a_server_whose_models_it_does_not_know(standin: Serving) -> None:
    answer = InferenceClient(model=standin.url).chat_completion([{"role": "user", "content": "hi"}], max_tokens=3)
    assert answer.model == "llama2"


def test_hugging_face_streams_without_blocking(deployment: Serving) -> None:
    async def stream(client: AsyncInferenceClient, prompt: str) -> tuple[str, str | None]:
        tokens = await client.text_generation(prompt, max_new_tokens=12, details=True, stream=True)
        steps = [step async for step in tokens]
        return "".join(step.token.text for step in steps if not step.token.special), steps[-1].generated_text

    async def all_streams() -> list[tuple[str, str | None]]:
        async with AsyncInferenceClient(model=deployment.url) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS[:8]))

    assert all(joined == whole for joined, whole in asyncio.run(all_streams()))


def test_hugging_face_knows_our_errors(standin: Serving) -> None:
    client = InferenceClient(model=standin.url)
    with pytest.raises(ValidationError, match="max_new_tokens: 9000 is more than"):
        client.text_generation("hi", max_new_tokens=9000)
    with pytest.raises(ValidationError, match="watermark: "):
        client.text_generation("hi", watermark=True, stream=True)


def test_hugging_face_knows_overload(slow_standin: Serving) -> None:
    with full_queue(slow_standin.client()), pytest.raises(OverloadedError):
        InferenceClient(model=slow_standin.url).text_generation("hi")


def body(inputs: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": parameters}


@pytest.mark.parametrize("path", ["/models/llama2", "/models/internlm/generate_stream"])
def test_httpx_sse_reads_the_older_events(deployment: Serving, path: str) -> None:
    request = body("hi there", {"max_new_tokens": 12}) | {"stream": True}
    with connect_sse(deployment.client(), "POST", path, json=request) as source:
        *steps, whole = [event.json() for event in source.iter_sse()]
    full = deployment.client().post("/models/llama2/generate", json=body("hi there", {"max_new_tokens": 12})).json()
    assert "".join(step["data"] for step in steps) == whole["data"] == full["generated_text"]


def test_sseclient_reads_the_older_events(deployment: Serving) -> None:
    request = body("hi there", {"max_new_tokens": 12})
    with deployment.client().stream("POST", "/models/llama2/generate_stream", json=request) as response:
        *steps, whole = [json.loads(event.data) for event in sseclient.SSEClient(response.iter_raw()).events()]
    assert {step["event"] for step in (*steps, whole)} == {"message"}
    assert "".join(step["data"] for step in steps) == whole["data"]


def test_sseclient_and_httpx_sse_read_text_generation_inference(standin: Serving) -> None:
    request = body("hi", {"max_new_tokens": 9})
    with standin.client().stream("POST", "/generate_stream", json=request) as response:
        one = [json.loads(event.data) for event in sseclient.SSEClient(response.iter_raw()).events()]
    with connect_sse(standin.client(), "POST", "/generate_stream", json=request) as source:
        other = [event.json() for event in source.iter_sse()]
    texts = ["".join(event["token"]["text"] for event in events) for events in (one, other)]
    assert texts == [answer("hi", 6) + "ж\ufffd"] * 2
