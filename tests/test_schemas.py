"""The older system's request body: every default, every spelling, every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from agent.protocol import SamplingParams
from client.schemas.legacy import LegacyParameters, LegacyRequest
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import GenerationParams

LIMITS = LimitsConfig()
EVERY_FIELD = [*LegacyParameters.model_fields]


def parse(parameters: object) -> LegacyParameters:
    return LegacyRequest.model_validate({"inputs": "x", "parameters": parameters}).parameters


def params(**parameters: object) -> GenerationParams:
    return parse(parameters).generation_params(LIMITS)


def refused_field(body: dict[str, Any]) -> tuple[int | str, ...]:
    with pytest.raises(ValidationError) as caught:
        LegacyRequest.model_validate(body)
    return caught.value.errors()[0]["loc"]


def test_the_smallest_request_has_the_documented_defaults() -> None:
    request = LegacyRequest.model_validate({"inputs": "hello"})
    given = request.parameters
    assert request.stream is False
    assert (given.do_sample, given.top_k, given.top_p, given.temperature) == (False, 3, 1.0, 1.0)
    assert (given.repetition_penalty, given.return_full_text, given.return_protocol) == (1.0, True, "sse")
    made = given.generation_params(LIMITS)
    assert (made.max_new_tokens, made.default_max_new_tokens) == (None, 300)
    assert made.sampling == SamplingParams(seed=made.sampling.seed)


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_null_is_the_default(field: str) -> None:
    assert parse({field: None}) == parse({})


@pytest.mark.parametrize("nothing", [None, {}])
def test_parameters_may_be_null_or_empty(nothing: object) -> None:
    assert parse(nothing) == LegacyParameters()


@pytest.mark.parametrize(("written", "meant"), [("True", True), ("False", False), ("true", True), (False, False)])
def test_booleans_also_arrive_as_text(written: object, meant: bool) -> None:
    given = parse({"do_sample": written, "return_full_text": written, "ignore_eos": written})
    assert (given.do_sample, given.return_full_text, given.ignore_eos) == (meant, meant, meant)


@pytest.mark.parametrize("written", ["yes", 1, 0, "", [], "None"])
def test_what_is_no_boolean_is_refused(written: object) -> None:
    assert refused_field({"inputs": "x", "parameters": {"do_sample": written}}) == ("parameters", "do_sample")


@pytest.mark.parametrize(
    ("field", "written", "meant"),
    [
        ("temperature", "0.8", 0.8),
        ("temperature", 1, 1.0),
        ("top_p", ".5", 0.5),
        ("repetition_penalty", " 1.02 ", 1.02),
        ("top_k", "12", 12),
        ("top_k", 12.0, 12),
        ("max_new_tokens", "1e2", 100),
        ("seed", str(2**64 - 1), 2**64 - 1),
        ("frequency_penalty", "-1.5", -1.5),
    ],
)
def test_numbers_also_arrive_as_text(field: str, written: object, meant: float) -> None:
    assert getattr(parse({field: written}), field) == meant


NUMBERS = ["temperature", "top_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty"]
COUNTS = ["top_k", "max_new_tokens", "min_new_tokens", "seed", "truncate", "top_n_tokens"]
NOT_NUMBERS = ["True", "nan", "inf", "0x10", "1_000", "٣", "", "1" * 60, True, False, [1], {"a": 1}]
NOT_FINITE = [float("nan"), float("inf"), float("-inf"), "1e999", 10**400]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("written", NOT_NUMBERS + NOT_FINITE, ids=lambda value: repr(value)[:12])
def test_what_is_no_finite_number_is_refused(field: str, written: object) -> None:
    assert refused_field({"inputs": "x", "parameters": {field: written}}) == ("parameters", field)


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("written", [*NOT_NUMBERS, *NOT_FINITE[:4], 1.5, "2.5"], ids=lambda value: repr(value)[:12])
def test_what_is_no_whole_number_is_refused(field: str, written: object) -> None:
    assert refused_field({"inputs": "x", "parameters": {field: written}}) == ("parameters", field)


@pytest.mark.parametrize(
    ("field", "written", "meant"),
    [
        ("top_k", -5, 0),
        ("top_k", 0, 0),
        ("top_k", 150, 150),
        ("top_p", 0, 0.01),
        ("top_p", -3, 0.01),
        ("top_p", 7, 1.0),
    ],
)
def test_the_three_clamps_of_the_older_system(field: str, written: float, meant: float) -> None:
    assert getattr(params(do_sample=True, **{field: written}).sampling, field) == meant


@pytest.mark.parametrize(
    ("field", "written"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("typical_p", 0),
        ("typical_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.005),
        ("repetition_penalty", -1),
        ("repetition_penalty", 101),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**31),
        ("min_new_tokens", -1),
        ("top_k", 2**31),
        ("seed", -1),
        ("truncate", 0),
        ("top_n_tokens", -1),
        ("return_protocol", 3),
        ("stop", "end"),
        ("stop", {"a": 1}),
    ],
)
def test_values_out_of_range_are_refused_by_name_even_when_greedy(field: str, written: object) -> None:
    assert refused_field({"inputs": "x", "parameters": {field: written}})[:2] == ("parameters", field)


@pytest.mark.parametrize("stop", [[""], ["x" * 1025], ["ok", 3], ["\ud800"]])
def test_stop_strings_are_bounded_texts(stop: list[object]) -> None:
    assert refused_field({"inputs": "x", "parameters": {"stop": stop}})[:2] == ("parameters", "stop")


@pytest.mark.parametrize("inputs", [None, "", 3, ["a"], "half a pair \ud83d"])
def test_a_prompt_is_a_text_that_is_not_empty(inputs: object) -> None:
    assert refused_field({"inputs": inputs}) == ("inputs",)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"stop": [str(i) for i in range(LIMITS.max_stop_strings + 1)]}, "stop"),
        ({"top_n_tokens": LIMITS.max_top_n_tokens + 1}, "top_n_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"min_new_tokens": 301}, "min_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
    ],
)
def test_the_deployment_caps_what_a_request_may_ask(parameters: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(**parameters)
    assert caught.value.field == field


@pytest.mark.parametrize("value", [None, False, "", [], {}, "False", "false"])
def test_a_foreign_field_that_says_nothing_is_ignored(value: object) -> None:
    assert parse({"watermark": value}) == LegacyParameters()
    assert LegacyRequest.model_validate({"inputs": "x", "adapter_id": value}).inputs == "x"


def test_a_foreign_field_with_its_default_is_ignored() -> None:
    assert parse({"best_of": 1}) == LegacyParameters()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("watermark", True),
        ("best_of", 2),
        ("best_of", True),
        ("num_beams", 4),
        ("typo", 0),
        ("typo", 0.0),
        ("typo", [0]),
    ],
)
def test_any_other_foreign_field_is_refused_by_name(field: str, value: object) -> None:
    assert refused_field({"inputs": "x", "parameters": {field: value}}) == ("parameters", field)
    assert refused_field({"inputs": "x", field: value}) == (field,)


def test_greedy_keeps_the_penalties_and_nothing_else_of_sampling() -> None:
    given = params(temperature=0.7, top_k=9, top_p=0.5, typical_p=0.9, repetition_penalty=1.2, seed=4, min_new_tokens=2)
    assert given.sampling == SamplingParams(repetition_penalty=1.2, seed=4, min_new_tokens=2)


def test_temperature_zero_is_greedy() -> None:
    assert params(do_sample=True, temperature=0, seed=1) == params(do_sample=False, seed=1)


def test_sampling_hands_every_field_on() -> None:
    fields = {"temperature": 0.7, "top_k": 9, "top_p": 0.5, "typical_p": 0.9, "repetition_penalty": 1.2}
    fields |= {"frequency_penalty": 0.5, "presence_penalty": -0.5, "seed": 3, "min_new_tokens": 4}
    given = params(do_sample=True, ignore_eos=True, stop=["a", "b"], truncate=7, max_new_tokens=9, **fields)
    assert given.sampling == SamplingParams(**fields)  # type: ignore[arg-type]
    assert (given.ignore_eos, given.stop, given.truncate, given.max_new_tokens) == (True, ("a", "b"), 7, 9)


def test_details_ask_for_log_probabilities() -> None:
    assert params(details=True).sampling.logprobs
    assert params(decoder_input_details=True).prompt_logprobs
    assert params(decoder_input_details=True).sampling.logprobs
    assert params(top_n_tokens=3).sampling.top_logprobs == 3
    plain = params()
    assert (plain.sampling.logprobs, plain.sampling.top_logprobs, plain.prompt_logprobs) == (False, 0, False)


def test_a_seed_is_drawn_for_each_request_that_brings_none() -> None:
    drawn = {params(do_sample=True).sampling.seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_the_schema_tells_of_every_field() -> None:
    schema = LegacyRequest.model_json_schema()
    fields = schema["$defs"]["LegacyParameters"]["properties"]
    assert list(fields) == [*EVERY_FIELD, "best_of"]
    assert {"type": "string"} in fields["top_k"]["anyOf"]
    assert "maximum" not in json.dumps(fields["top_p"])  # clamped, not refused
