"""The libraries that people reach an OpenAI server with, as they are published: openai and langchain-openai."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from default_model import default_model
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr
from serving_processes import Serving, serving

from agent.arithmetic_model import answer

HI: list[Any] = [{"role": "user", "content": "hi"}]
HOT: dict[str, Any] = {"model": "llama2", "messages": HI, "max_tokens": 12, "temperature": 1.5}


@pytest.fixture(scope="module")
def default_deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Agents and app on the default model."""
    model = {"path": str(default_model("float32")), "target": "cpu", "cache_memory": "64MiB"}
    with serving(tmp_path_factory.mktemp("openai"), [model]) as started:
        yield started


@pytest.fixture(params=["standin", pytest.param("default_deployment", marks=pytest.mark.slow)])
def deployment(request: pytest.FixtureRequest) -> Serving:
    """The stand-in, and in the long run of the tests the default model too."""
    started: Serving = request.getfixturevalue(request.param)
    return started


@pytest.fixture
def api(deployment: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(api: OpenAI) -> None:
    names = [model.id for model in api.models.list()]
    assert names[:2] == ["llama2", "internlm"]
    assert api.models.retrieve("internlm").id == "internlm"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_a_chat_streams_what_it_answers_whole(api: OpenAI) -> None:
    whole = api.chat.completions.create(**{**HOT, "seed": 3})
    text, usage = whole.choices[0].message.content, whole.usage
    assert text
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(
        api.chat.completions.create(**{**HOT, "seed": 3}, stream=True, stream_options={"include_usage": True})
    )
    first, *middle, last, counted = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == text
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, whole.choices[0].finish_reason)
    assert counted.choices == []
    assert counted.usage is not None
    assert (counted.usage.prompt_tokens, counted.usage.completion_tokens) == (
        usage.prompt_tokens,
        usage.completion_tokens,
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {first.id}


def test_answers_to_one_prompt_differ_and_repeat(api: OpenAI) -> None:
    several = api.chat.completions.create(**{**HOT, "seed": 5, "n": 4})
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    alone = [api.chat.completions.create(**{**HOT, "seed": 5 + i}).choices[0].message.content for i in range(4)]
    assert alone == texts
    streamed = [""] * 4
    for chunk in api.chat.completions.create(**{**HOT, "seed": 5, "n": 4}, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs_tell_the_tokens_of_the_content(api: OpenAI) -> None:
    choice = api.chat.completions.create(**{**HOT, "temperature": 0}, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5)


def test_every_parameter_is_taken(api: OpenAI) -> None:
    common: dict[str, Any] = {
        "model": "llama2", "n": 1, "seed": 1, "temperature": 0.9, "top_p": 0.95, "stop": ["never in it"],
        "frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": {"5": -100}, "user": "somebody",
        "extra_body": {
            "top_k": 30, "min_p": 0.01, "typical_p": 0.99, "repetition_penalty": 1.1, "min_tokens": 3,
            "ignore_eos": True, "stop_token_ids": [7], "priority": -1, "cache_salt": "mine",
        },
    }  # fmt: skip
    chat = api.chat.completions.create(
        messages=HI, max_completion_tokens=6, metadata={"a": "b"}, store=False, logprobs=True, service_tier="auto",
        safety_identifier="me", prompt_cache_key="mine", verbosity="medium", reasoning_effort="none",
        parallel_tool_calls=True, modalities=["text"], **common
    )  # fmt: skip
    assert chat.service_tier == "default"
    text = api.completions.create(prompt="hi", max_tokens=6, best_of=1, echo=True, logprobs=1, **common)
    assert chat.usage is not None
    assert text.usage is not None
    assert 3 <= chat.usage.completion_tokens <= 6
    assert 3 <= text.usage.completion_tokens <= 6
    assert text.choices[0].text.startswith("hi")


def test_completions_of_texts_and_token_ids(api: OpenAI, deployment: Serving) -> None:
    ids = deployment.client().post("/tokenize", json={"prompt": "hi"}).json()["tokens"]
    greedy: dict[str, Any] = {"model": "llama2", "max_tokens": 5, "temperature": 0}
    batch = api.completions.create(prompt=["hi", "the sea"], **greedy)
    texts = [choice.text for choice in batch.choices]
    assert texts == [api.completions.create(prompt=one, **greedy).choices[0].text for one in ("hi", "the sea")]
    assert api.completions.create(prompt=ids, **greedy).choices[0].text == texts[0]
    assert (
        "".join(chunk.choices[0].text for chunk in api.completions.create(prompt="hi", stream=True, **greedy))
        == (texts[0])
    )


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_is_scored(api: OpenAI, max_tokens: int) -> None:
    request: dict[str, Any] = {"model": "llama2", "max_tokens": max_tokens, "temperature": 0, "echo": True}
    scored = api.completions.create(prompt="the sea", logprobs=1, **request)
    choice = scored.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert logprobs.text_offset
    assert scored.usage is not None
    assert scored.usage.completion_tokens == max_tokens
    assert len(logprobs.tokens) == scored.usage.prompt_tokens + max_tokens
    assert logprobs.token_logprobs[0] is None
    for token, logprob, best in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        assert math.isfinite(logprob)
        assert best[token] <= max(best.values())
    assert choice.text.startswith("the sea")
    assert (choice.text == "the sea") == (max_tokens == 0)


def test_errors_are_those_that_the_library_knows(standin: Serving) -> None:
    with OpenAI(base_url=f"{standin.url}/v1", api_key="none", max_retries=0) as api:
        with pytest.raises(openai.BadRequestError) as too_long:
            api.completions.create(model="llama2", prompt="x" * 9000)
        assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.BadRequestError, match="tools: ") as unknown:
            api.chat.completions.create(model="llama2", messages=HI, extra_body={"tools": [1]})
        assert unknown.value.param == "tools"
        with pytest.raises(openai.NotFoundError, match="has no /v1/embeddings"):
            api.embeddings.create(model="llama2", input="hi")
        with pytest.raises(openai.NotFoundError, match="has no /v1/responses"):
            api.responses.create(model="llama2", input="hi")


def test_without_blocking(deployment: Serving) -> None:
    async def stream(api: AsyncOpenAI, seed: int) -> str:
        chunks = await api.chat.completions.create(**{**HOT, "seed": seed}, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def whole(api: AsyncOpenAI, seed: int) -> str | None:
        return (await api.chat.completions.create(**{**HOT, "seed": seed})).choices[0].message.content

    async def together() -> tuple[list[str], list[str | None]]:
        async with AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as api:
            return (
                await asyncio.gather(*(stream(api, seed) for seed in range(6))),
                await asyncio.gather(*(whole(api, seed) for seed in range(6))),
            )

    streamed, full = asyncio.run(together())
    assert streamed == full


def langchain(deployment: Serving, max_tokens: int) -> ChatOpenAI:
    key = SecretStr("none")
    url = f"{deployment.url}/v1"
    return ChatOpenAI(base_url=url, api_key=key, model="llama2", temperature=0, max_completion_tokens=max_tokens)


def test_langchain_invokes_streams_and_batches(deployment: Serving) -> None:
    chat = langchain(deployment, 8)
    whole = chat.invoke("hi")
    assert whole.content
    assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == whole.content
    assert [one.content for one in chat.batch(["hi", "hi"])] == [whole.content] * 2
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    asked = [("system", "Be kind."), ("user", "hi"), ("assistant", "hello"), ("user", "why?")]
    assert asyncio.run(chat.ainvoke(asked)).content


class Trip(BaseModel):
    """A trip."""

    city: Literal["Bern", "北京"]
    days: int = Field(ge=1, le=9)


@pytest.mark.slow  # on the stand-in, test_openai_forms.py does it
def test_langchain_gets_objects_of_the_default_model(default_deployment: Serving) -> None:
    model = langchain(default_deployment, 300)
    assert isinstance(model.with_structured_output(Trip, method="json_schema").invoke("Where to?"), Trip)


def test_the_stand_ins_text_comes_through(standin: Serving) -> None:
    with OpenAI(base_url=f"{standin.url}/v1", api_key="none") as api:
        text = api.completions.create(model="llama2", prompt="hi", temperature=0).choices[0].text
        assert text == answer("hi", 13)  # 16 tokens: two characters have more than one
