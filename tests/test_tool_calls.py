"""Tools and forms of a request, the grammar that they make, and the calls that are read from an answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.arithmetic_model import END, VOCAB_SIZE
from agent.logits import Logits
from agent.protocol import SamplingParams, SeatReset, pack_ints
from agent.sampler import Sampler
from client.schemas.answer_form import FormedBody
from client.schemas.tools import AssistantToolCall, ToolsBody, tool_calls_content
from config.grammar_engine import GrammarEngine
from config.manifest import read_manifest
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.grammar import GrammarCompiler
from server.tokenizer import Tokenizer
from server.tool_calls import CLOSE, OPEN, ToolCall, ToolCallParser

STANDIN = Path(__file__).parent.parent / "config" / "standin"
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Bern", "東京"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"properties": {}, "additionalProperties": False}},
}


def parsed(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    parser, shown, calls = ToolCallParser(), "", []
    for piece in pieces:
        text, found = parser.feed(piece)
        shown += text
        calls += found
    return shown + parser.flush(), calls


def generated(body: ToolsBody, seed: int, steps: int = 250) -> str | None:
    """An answer of random tokens that keeps to the request; None: it did not end."""
    manifest = read_manifest(STANDIN)
    engine = GrammarEngine(STANDIN, manifest)
    constraint = body.constraint()
    assert constraint is not None
    grammar = asyncio.run(GrammarCompiler(engine, LimitsConfig()).compile(constraint))
    params = SamplingParams(temperature=1.0, seed=seed, grammar=grammar, end_token_ids=(END,))
    sampler, seat = Sampler(1, VOCAB_SIZE, engine), np.zeros(1, np.int32)
    sampler.reset(SeatReset(seat=0, params=params, prompt_ids=pack_ints([65]), output_ids=b""))
    numbers, tokens = np.random.default_rng(seed), []
    while len(tokens) < steps:
        logits = numbers.normal(size=(1, VOCAB_SIZE)).astype(np.float32) * 2
        [token] = sampler.sample(Logits.of(logits), seat)
        if token == END:
            engine.close()
            return bytes(tokens).decode()
        tokens.append(int(token))
    engine.close()
    return None


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_demanded_calls_are_of_the_tools_and_their_schemas(choice: Any, parallel: bool) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "parallel_tool_calls": parallel}
    body, ended = ToolsBody.model_validate(fields), 0
    for seed in range(6):
        answer = generated(body, seed)
        if answer is None:
            continue
        ended += 1
        shown, calls = parsed([answer])
        assert not shown
        assert len(calls) == 1 or (parallel and choice == "required")
        for call in calls:
            assert call.name == "weather" or (choice == "required" and call.name == "clock")
            jsonschema.validate(json.loads(call.arguments), CITY if call.name == "weather" else {"maxProperties": 0})
    assert ended


def test_a_model_that_decides_says_text_or_makes_calls() -> None:
    """Random text begins with few tags; one that is there leads to a call."""
    body = ToolsBody.model_validate({"tools": [WEATHER]})
    constraint = body.constraint()
    assert constraint is not None
    engine = GrammarEngine(STANDIN, read_manifest(STANDIN))
    grammar = asyncio.run(GrammarCompiler(engine, LimitsConfig()).compile(constraint))
    call = f'{OPEN}\n{{"name": "weather", "arguments": {{"city": "東京"}}}}\n{CLOSE}'
    for text, complete in {
        "": True,
        "Hello <tool_cal": True,
        call: True,
        f"Let me see.\n{call}\n{call}": True,
        call[:-1]: False,
        OPEN: False,
    }.items():
        matcher = engine.matcher(grammar)
        assert matcher.consume_tokens(list(text.encode()))
        assert matcher.is_accepting() == complete
    for text in (f"{OPEN}boo", call.replace("weather", "clock"), call.replace("東京", "Paris"), f"{call} and"):
        assert not engine.matcher(grammar).consume_tokens(list(text.encode()))
    engine.close()


pieces = st.sampled_from(
    ["text ", "é", "<", "<tool_call", OPEN, CLOSE, '{"name": "a", "arguments": {"x": 1}}', "\n", "{", '"name": "b"']
)


@given(st.lists(pieces, max_size=12), st.data())
def test_calls_are_read_alike_however_the_text_comes(texts: list[str], data: st.DataObject) -> None:
    whole = "".join(texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    split = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    shown, calls = parsed(split)
    expected = parsed([whole])
    assert calls == expected[1]
    assert "".join(shown.split()) == "".join(expected[0].split())
    assert len(calls) == sum(OPEN in part for part in whole.split(CLOSE)) or shown


@pytest.mark.parametrize(
    ("answer", "shown", "arguments"),
    [
        (f'Hi{OPEN}\n{{"name": "a", "arguments": {{"x": [1, "é"]}}}}\n{CLOSE}', "Hi", ['{"x": [1, "é"]}']),
        (
            f'{OPEN}{{"name": "a", "arguments": {{}}}}{CLOSE}\n{OPEN}{{"name": "b", "arguments": {{}}}}{CLOSE}',
            "",
            ["{}", "{}"],
        ),
        (f"{OPEN}no call{CLOSE}", f"{OPEN}no call{CLOSE}", []),
        (f'{OPEN}{{"name": 1, "arguments": {{}}}}{CLOSE}', f'{OPEN}{{"name": 1, "arguments": {{}}}}{CLOSE}', []),
        (f'{OPEN}{{"name": "a", "argum', f'{OPEN}{{"name": "a", "argum', []),
        (f"{OPEN}{'[' * 100_000}{CLOSE}", f"{OPEN}{'[' * 100_000}{CLOSE}", []),
        ("1 < 2 <tool", "1 < 2 <tool", []),
        (f"{OPEN}__import__('os').abort(){CLOSE}", f"{OPEN}__import__('os').abort(){CLOSE}", []),
    ],
)
def test_calls_and_what_only_looks_like_one(answer: str, shown: str, arguments: list[str]) -> None:
    text, calls = parsed([answer])
    assert text == shown
    assert [call.arguments for call in calls] == arguments
    assert parsed(list(answer[:500]))[1] == calls[: len(parsed([answer[:500]])[1])]


def test_calls_in_openai_s_shape() -> None:
    calls = [ToolCall(name="a", arguments="{}"), ToolCall(name="b", arguments='{"x": 1}')]
    full, stream = tool_calls_content(calls), tool_calls_content(calls, first_index=3)
    assert [call["function"] for call in full] == [
        {"name": "a", "arguments": "{}"},
        {"name": "b", "arguments": '{"x": 1}'},
    ]
    assert [call["index"] for call in stream] == [3, 4]
    ids = [call["id"] for call in (*full, *stream)]
    assert len(set(ids)) == 4
    assert all(one.startswith("call_") for one in ids)


def test_the_template_shows_tools_and_earlier_calls() -> None:
    tokenizer = Tokenizer(STANDIN, read_manifest(STANDIN).tokenizer)
    assert tokenizer.takes_tools
    body = ToolsBody.model_validate({"tools": [WEATHER]})
    called = AssistantToolCall.model_validate(
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    )
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [called.for_template()]},
        {"role": "tool", "content": "yes", "tool_call_id": "call_1"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tools=body.tools_for_template())
    assert f"<|system|>{json.dumps(WEATHER, ensure_ascii=False)}" in prompt
    assert f'<|assistant|>{OPEN}\n{{"name": "weather", "arguments": {{"city": "Bern"}}}}\n{CLOSE}' in prompt
    assert prompt.endswith("<|tool|>yes\n<|assistant|>")


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((STANDIN / "tokenizer.json").read_bytes())
    template = tmp_path / "chat_template.jinja"
    for source in ("{{ messages }}", "{{ messages }} <tool_call> no tools", "{{ messages }}{{ tools }} [TOOL_CALLS]"):
        template.write_text(source, encoding="utf-8")
        tokenizer = Tokenizer(tmp_path, read_manifest(STANDIN).tokenizer)
        assert not tokenizer.takes_tools
        with pytest.raises(InvalidRequest, match="shows it no tools") as refused:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tools=[WEATHER])
        assert refused.value.field == "tools"


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY, "strict": True}}},
            "json_schema",
            CITY,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"json": CITY}}, "json_schema", CITY),
        ({"structured_outputs": {"json": json.dumps(CITY), "regex": None}}, "json_schema", CITY),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "grammar", "start: /a/"),
        ({"guided_json": CITY}, "json_schema", CITY),
        ({"guided_regex": "a+", "guided_choice": None}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", ["a"]),
        ({"guided_grammar": "start: /a/"}, "grammar", "start: /a/"),
        ({}, None, None),
    ],
)
def test_forms(fields: dict[str, Any], kind: str | None, value: Any) -> None:
    constraint = FormedBody.model_validate(fields).constraint()
    assert (constraint.kind, constraint.value) == (kind, value) if constraint else kind is None


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_object", "schema": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": "ab"}},
        {"structured_outputs": {"json": "no json"}},
        {"structured_outputs": {"structural_tag": "{}"}},
        {"guided_regex": 5},
        {"tools": [{"type": "function", "function": {"name": "no name"}}]},
        {"tools": [{"type": "retrieval"}]},
        {"tools": [WEATHER, WEATHER]},
        {"tools": [WEATHER], "tool_choice": "any"},
    ],
)
def test_bodies_that_are_none(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ToolsBody.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ToolsBody.model_validate(fields).constraint()
    assert refused.value.field == field


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    body = ToolsBody.model_validate({"tools": [WEATHER], "tool_choice": "none", "guided_regex": "a"})
    assert body.tools_for_template() is None
    constraint = body.constraint()
    assert constraint is not None
    assert constraint.kind == "regex"


@pytest.mark.parametrize("arguments", ["no json", "[1]", "[" * 100_000])
def test_arguments_of_earlier_calls_are_objects(arguments: str) -> None:
    function = {"name": "a", "arguments": arguments}
    call = AssistantToolCall.model_validate({"id": "call_1", "type": "function", "function": function})
    with pytest.raises(InvalidRequest, match="call_1 are no JSON object"):
        call.for_template()
