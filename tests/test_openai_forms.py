"""Answers of a form and calls of tools on the OpenAI routes, through the libraries that people use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, Field, SecretStr
from serving_processes import Serving

HI: list[Any] = [{"role": "user", "content": "hi"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "北京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture
def api(standin: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{standin.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(api: OpenAI, **settings: Any) -> Any:
    return api.chat.completions.create(model="llama2", messages=HI, **settings)


@pytest.mark.parametrize("seed", range(3))
def test_a_chat_keeps_to_its_schema_whole_and_streamed(api: OpenAI, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    settings = {"response_format": form, "temperature": 2.0, "seed": seed, "max_tokens": 300}
    whole = chat(api, **settings).choices[0]
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), CITY)
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(api, stream=True, **settings)]
    assert "".join(parts) == whole.message.content


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"choice": ["好", "🙂"]}}, {"好", "🙂"}),
        ({"structured_outputs": {"regex": "a{2}|b{3}"}}, {"aa", "bbb"}),
        ({"guided_grammar": 'start: "x" | "y"'}, {"x", "y"}),
        ({"structured_outputs": {"json": {"const": 7}}}, {"7"}),
        ({"response_format": {"type": "regex", "value": "c|d"}}, {"c", "d"}),
        ({"response_format": {"type": "json_object", "value": {"const": 8}}}, {"8"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same at every collection
)
def test_a_completion_has_the_form_that_vllm_names(api: OpenAI, form: dict[str, Any], answers: set[str]) -> None:
    done = api.completions.create(model="llama2", prompt="hi", n=4, temperature=2.0, max_tokens=50, extra_body=form)
    assert {choice.text for choice in done.choices} <= answers
    assert {choice.finish_reason for choice in done.choices} == {"stop"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_demanded_call_is_made(api: OpenAI, choice: Any) -> None:
    settings = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300, "seed": 1}
    whole = chat(api, **settings).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    [call] = whole.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    chunks = [chunk.choices[0] for chunk in chat(api, stream=True, **settings)]
    [delta] = [one for chunk in chunks for one in chunk.delta.tool_calls or ()]
    assert (delta.index, delta.function.name) == (0, "weather")
    assert delta.function.arguments == call.function.arguments
    assert not any(chunk.delta.content for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_a_call_and_what_it_came_to_go_into_the_next_prompt(api: OpenAI) -> None:
    settings: dict[str, Any] = {"tools": [WEATHER, CLOCK], "max_tokens": 300}
    first = chat(api, tool_choice="required", **settings).choices[0].message
    turns = [*HI, first.model_dump(exclude_none=True, exclude={"refusal"})]
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "12 °C"} for call in first.tool_calls]
    second = api.chat.completions.create(model="llama2", messages=turns, temperature=0, tool_choice="none", **settings)
    assert second.choices[0].finish_reason in ("stop", "length")
    assert second.choices[0].message.tool_calls is None
    assert second.usage.prompt_tokens > len("12 °C")


def test_a_call_may_be_left_to_the_model(api: OpenAI) -> None:
    for seed in range(3):
        answer = chat(api, tools=[WEATHER], temperature=1.0, seed=seed, max_tokens=100).choices[0]
        for call in answer.message.tool_calls or ():
            jsonschema.validate(json.loads(call.function.arguments), CITY)
        assert "<tool_call>\n" not in (answer.message.content or "") or answer.finish_reason == "length"


def test_a_form_that_cannot_be_kept_is_refused_by_its_field(client: httpx.Client) -> None:
    body = {"model": "llama2", "messages": HI, "guided_json": {"not": {"type": "string"}}}
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "guided_json"


def test_an_answer_in_internlms_chat_template_ends_where_the_template_says(api: OpenAI) -> None:
    form: dict[str, Any] = {"extra_body": {"guided_regex": "ab<eoa>cd"}, "max_tokens": 20}
    texts = {}
    for model in ("llama2", "internlm"):
        whole = api.chat.completions.create(model=model, messages=HI, **form).choices[0]
        parts = api.chat.completions.create(model=model, messages=HI, stream=True, **form)
        texts[model] = whole.message.content
        assert whole.finish_reason == "stop"
        assert "".join(part.choices[0].delta.content or "" for part in parts) == texts[model]
    assert texts == {"llama2": "ab<eoa>cd", "internlm": "ab"}


class Trip(BaseModel):
    """A trip."""

    city: Literal["Bern", "北京"]
    days: int = Field(ge=1, le=9)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_objects(standin: Serving, method: Any) -> None:
    model = ChatOpenAI(
        model="llama2",
        base_url=f"{standin.url}/v1",
        api_key=SecretStr("none"),
        max_retries=0,
        max_completion_tokens=300,
    )
    trip = model.with_structured_output(Trip, method=method).invoke("Where to?")
    assert isinstance(trip, Trip)
