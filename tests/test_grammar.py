"""Answers that must have a form: what the agent lets be said, and what the server takes for a grammar."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_processes import serving

from agent.arithmetic_model import END, VOCAB_SIZE
from agent.logits import Logits
from agent.protocol import Floats, SamplingParams, SeatReset, pack_ints
from agent.sampler import Sampler
from config.grammar_engine import GrammarEngine
from config.manifest import read_manifest
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.grammar import MAX_WRITTEN_OUT, GrammarCompiler
from server.request import Constraint, ConstraintKind

STANDIN = Path(__file__).parent.parent / "config" / "standin"
SEATS = 8
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choices": {"enum": ["yes", "no", 1, None, {"a": [True]}]},
    "array": {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "maxItems": 3},
    "union": {
        "anyOf": [
            {"type": "object", "properties": {"é": {"const": "中"}}, "required": ["é"], "additionalProperties": False},
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
            {"type": "boolean"},
        ]
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
    },
}


@pytest.fixture(scope="module")
def engine() -> Iterator[GrammarEngine]:
    opened = GrammarEngine(STANDIN, read_manifest(STANDIN))
    yield opened
    opened.close()


def compiled(engine: GrammarEngine, kind: ConstraintKind, value: Any, **limits: Any) -> str:
    compiler = GrammarCompiler(engine, LimitsConfig(**limits))
    return asyncio.run(compiler.compile(Constraint(kind=kind, value=value, field="response_format")))


def random_logits(steps: int, rows: int, seed: int) -> Floats:
    return (np.random.default_rng(seed).normal(size=(steps, rows, VOCAB_SIZE)) * 4).astype(np.float32)


def reset(params: SamplingParams, output: list[int] | None = None, seat: int = 0) -> SeatReset:
    return SeatReset(seat=seat, params=params, prompt_ids=pack_ints([65]), output_ids=pack_ints(output or []))


def answers(engine: GrammarEngine, logits: Floats, *resets: SeatReset) -> list[list[int]]:
    """The tokens of requests that are sampled together, one for each of the steps, also after an end token."""
    sampler = Sampler(SEATS, VOCAB_SIZE, engine)
    for one in resets:
        sampler.reset(one)
    seats = np.array([one.seat for one in resets], np.int32)
    return np.array([sampler.sample(Logits.of(step), seats) for step in logits]).T.tolist()


def text(tokens: list[int]) -> str:
    """The answer up to its end token."""
    return bytes(tokens[: tokens.index(END)]).decode()


sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    typical_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    min_new_tokens=st.sampled_from([0, 40]),
    end_token_ids=st.just((END,)),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_that_ends_is_json_of_its_schema(engine: GrammarEngine, name: str) -> None:
    grammar, ended = compiled(engine, "json_schema", SCHEMAS[name]), []

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(sampling, st.integers(0, 10**6))
    def check(params: SamplingParams, seed: int) -> None:
        params = msgspec.structs.replace(params, grammar=grammar)
        [tokens] = answers(engine, random_logits(110, 1, seed), reset(params))
        ended.append(END in tokens)
        if ended[-1]:
            jsonschema.validate(json.loads(text(tokens)), SCHEMAS[name])
            assert set(tokens[tokens.index(END) :]) == {END}, "after its end a grammar lets nothing else be said"

    check()
    assert sum(ended) > len(ended) / 2


def constrained(engine: GrammarEngine, **settings: Any) -> list[SamplingParams]:
    """Different grammars and none, for a batch."""
    plain = SamplingParams(temperature=1.0, end_token_ids=(END,), **settings)
    grammars = [compiled(engine, "json_schema", SCHEMAS[name]) for name in ("flat", "tree", "union")]
    grammars += [compiled(engine, "regex", r"[a-f]{3}( \d+)*"), compiled(engine, "choice", ["yes", 'no \x00/\\ "é'])]
    return [plain, *(msgspec.structs.replace(plain, grammar=grammar) for grammar in grammars), SamplingParams()]


def test_neighbours_do_not_matter(engine: GrammarEngine) -> None:
    """Each row gets the tokens that it gets alone; one without a grammar those that it gets without such neighbours."""
    params, logits = constrained(engine, repetition_penalty=1.3), random_logits(60, 7, seed=1)
    together = answers(engine, logits, *(reset(one, seat=seat) for seat, one in enumerate(params)))
    alone = [answers(engine, logits[:, [i]], reset(one))[0] for i, one in enumerate(params)]
    assert together == alone
    assert re.fullmatch(r"[a-f]{3}( \d+)*", text(together[4]))
    assert text(together[5]) in ("yes", 'no \x00/\\ "é')


@pytest.mark.parametrize("preempted_after", [0, 1, 7, 33, 59])
def test_preemption_does_not_matter(engine: GrammarEngine, preempted_after: int) -> None:
    for params in constrained(engine):
        logits = random_logits(60, 1, seed=preempted_after)
        [tokens] = answers(engine, logits, reset(params))
        before = tokens[:preempted_after]
        [after] = answers(engine, logits[preempted_after:], reset(params, before))
        assert before + after == tokens


def test_logits_are_as_before_and_log_probabilities_are_of_them(engine: GrammarEngine) -> None:
    logits = Logits.of(random_logits(1, 1, seed=2)[0])
    values, maxima = logits.values.copy(), logits.maxima.copy()
    sampler, seat = Sampler(SEATS, VOCAB_SIZE, engine), np.array([0], np.int32)
    sampler.reset(reset(SamplingParams(logprobs=True, grammar=compiled(engine, "regex", "[xy]"))))
    [token] = sampler.sample(logits, seat)
    assert token == max(b"xy", key=lambda byte: values[0, byte])
    assert (logits.values == values).all()
    assert (logits.maxima == maxima).all()
    [logprob], _, _ = sampler.logprobs(logits, seat, np.array([token]))
    assert logprob == pytest.approx(values[0, token] - np.log(np.exp(values[0].astype(np.float64)).sum()), abs=1e-5)


def test_the_end_is_allowed_where_the_grammar_may_end(engine: GrammarEngine) -> None:
    """The model wants to end at once, or never; min_new_tokens counts only while there is something else to say."""
    eager, never = np.zeros((12, 1, VOCAB_SIZE), np.float32), np.zeros((12, 1, VOCAB_SIZE), np.float32)
    eager[..., END], never[..., END] = 9.0, -9.0
    params = SamplingParams(end_token_ids=(END,), grammar=compiled(engine, "regex", "ab(cd){0,2}"))
    assert text(answers(engine, eager, reset(params))[0]) == "ab"
    assert text(answers(engine, never, reset(params))[0]) == "abcdcd"
    params = msgspec.structs.replace(params, min_new_tokens=4)
    assert text(answers(engine, eager, reset(params))[0]) == "abcd"
    params = msgspec.structs.replace(params, min_new_tokens=9)
    assert text(answers(engine, eager, reset(params))[0]) == "abcdcd"


@pytest.mark.parametrize(
    "grammar",
    [
        "no grammar",
        '{"grammars": 1}',
        "start: /[^\\s\\S]/",
        'start: "a" </s> "b"',
        "start: T\nT: (/.*a.{9}/ & /.*b.{9}/ & /.*c.{9}/)",
    ],
    ids=["nonsense", "wrong", "nothing", "end token", "large"],
)
def test_a_grammar_that_cannot_go_on_ends_its_answer_and_nothing_else(engine: GrammarEngine, grammar: str) -> None:
    """A grammar that the server would have refused, or one that reaches a limit later."""
    broken = SamplingParams(end_token_ids=(END,), grammar=grammar)
    logits = random_logits(150, 2, seed=5)
    logits[:, 0, END] = -9.0
    sampler, seats = Sampler(SEATS, VOCAB_SIZE, engine), np.array([0, 1], np.int32)
    sampler.reset(reset(broken))
    sampler.reset(reset(SamplingParams(), seat=1))
    tokens = []
    while not sampler.failed(seats):
        tokens.append(sampler.sample(Logits.of(logits[len(tokens)]), seats).tolist())
    assert sampler.failed(seats) == [0]
    assert [row[0] for row in tokens].index(END) == len(tokens) - 1, "the end token comes with the failure"
    assert [row[1] for row in tokens] == logits[: len(tokens), 1].argmax(axis=1).tolist()


REFUSED: list[tuple[ConstraintKind, Any, str]] = [
    ("json_schema", {"type": "strnig"}, "Invalid type: strnig"),
    ("json_schema", {"$ref": "http://127.0.0.1/schema.json"}, "does not fetch"),
    ("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch"),
    ("json_schema", {"$ref": "#/$defs/a"}, "does not exist"),
    ("json_schema", {"$ref": "#"}, "describes no text"),
    ("json_schema", {"$ref": "#/a", "a": {"anyOf": [{"$ref": "#/a"}]}}, "cannot be used"),
    ("json_schema", {"not": {"type": "null"}}, 'Unimplemented keys: ["not"]'),
    ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, 'Unimplemented keys: ["not"]'),
    ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", {"enum": [f"value {i}" for i in range(100_000)]}, "at most 32768"),
    ("json_schema", {"description": "x" * 10**6}, "at most 32768"),
    ("json_schema", {"minimum": float("nan")}, "no JSON"),
    ("json_schema", {"type": "string", "pattern": "^(a{500}){500}$"}, "written out"),
    ("json_schema", {"patternProperties": {"^(a{500}){500}$": {}}}, "written out"),
    ("json_schema", {"properties": {f"p{i}": {} for i in range(2_000)}}, "cannot be used"),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(700)}}, "cannot be used"),
    ("regex", "(", "unclosed group"),
    ("regex", "(?=a)b", "look-ahead"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", r"[^\s\S]", "describes no text"),
    ("regex", "x(a{1000}){1000}", "written out"),
    ("regex", "(((((a{10}){10}){10}){10}){10}){10}", "written out"),
    ("regex", "(?x)(a{1000}) {1000}", "flag x"),
    ("regex", "a(?i-x: b)", "flag x"),
    ("regex", "(" * 10_000 + ")" * 10_000, "cannot be used"),
    ("choice", ["\ud800"], "no JSON"),
    ("grammar", "start: nothing", "nothing"),
    ("grammar", "start: a\na: a", "describes no text"),
    ("grammar", "start: b{1000}\nb: /a{1000}/", "written out"),
    ("grammar", "start: " + "(" * 10_000 + '"a"' + ")" * 10_000, "deeply nested"),
    ("grammar", 'root ::= "a" | missing', "missing"),
    ("grammar", "\n" * 30_000, "cannot be used"),
]


@pytest.mark.parametrize(("kind", "value", "reason"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_used_is_refused_with_the_reason(
    engine: GrammarEngine, kind: ConstraintKind, value: Any, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiled(engine, kind, value)
    assert refused.value.field == "response_format"
    assert reason in refused.value.message
    assert len(refused.value.message) < 400


def nested_schema(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("levels", [200, 900, 50_000])
def test_nested_schemas_are_refused(engine: GrammarEngine, levels: int) -> None:
    with pytest.raises(InvalidRequest):
        compiled(engine, "json_schema", nested_schema(levels))


def test_definitions_that_lead_to_each_other_are_no_deeper_than_the_stack(engine: GrammarEngine) -> None:
    """A chain that ends a thread of the usual stack, and the process with it."""
    chain = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"type": "null"}]} for i in range(1_000)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**chain, "a1000": {"type": "boolean"}}}
    assert compiled(engine, "json_schema", schema, max_grammar_bytes=1 << 20)
    rules = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4_000)) + 'r4000: "a"'
    assert compiled(engine, "grammar", rules, max_grammar_bytes=1 << 20)


@pytest.mark.parametrize(
    ("regex", "taken"),
    [
        (r"[]{]{3}a{2,5}\p{L}{30}\x{41}[a[^]b]{9}]", True),
        (r"\{99999\}", True),
        (r"[{99999}]", True),
        (r"\p{Greek}{9999}", True),
        (r"\p{Greek}{10001}", False),
        (r"[^]]{10001}", False),
        (r"(\(a[)]){4000}", False),
        (f"a{{{MAX_WRITTEN_OUT}}}", True),
        (f"a{{0,{MAX_WRITTEN_OUT + 1}}}", False),
        (f"a{{{'9' * 400}}}", False),
        ("(?:a{100}|b){90}", True),
        ("(?P<x>a{2})(?i:x)", True),
        ("(a{,200}){,200}", False),
    ],
)
def test_counted_repetitions_are_written_out_to_a_limit(engine: GrammarEngine, regex: str, taken: bool) -> None:
    if taken:
        assert compiled(engine, "regex", regex)
    else:
        with pytest.raises(InvalidRequest, match="written out"):
            compiled(engine, "regex", regex)


@pytest.mark.parametrize("grammar", ['start: "a" | "b" start', 'root ::= "a" | "b" root'])
def test_grammars_have_two_notations(engine: GrammarEngine, grammar: str) -> None:
    params = SamplingParams(grammar=compiled(engine, "grammar", grammar), end_token_ids=(END,))
    assert re.fullmatch("b*a", text(answers(engine, random_logits(60, 1, seed=4), reset(params))[0]))


def test_a_compiler_is_given_so_much_time(engine: GrammarEngine) -> None:
    with pytest.raises(InvalidRequest, match="s to compile; at most 1e-09 s"):
        compiled(engine, "regex", "a+", max_grammar_seconds=1e-9)


def test_a_model_without_end_token_cannot_end_a_form() -> None:
    manifest = read_manifest(STANDIN)
    rules = msgspec.structs.replace(manifest.tokenizer, eos_token_ids=())
    endless = GrammarEngine(STANDIN, msgspec.structs.replace(manifest, tokenizer=rules))
    with pytest.raises(InvalidRequest, match="needs a model with an end token"):
        compiled(endless, "regex", "a+")


def asked(client: httpx.Client, grammar: Any, *, stream: bool = False, **parameters: Any) -> httpx.Response:
    body = {"inputs": "hi", "parameters": {"grammar": grammar, "details": True, **parameters}}
    return client.post("/generate_stream" if stream else "/generate", json=body)


def streamed_text(response: httpx.Response) -> tuple[str, str]:
    """Text and finish reason of a stream."""
    events = [json.loads(line.removeprefix("data:")) for line in response.text.splitlines() if line]
    assert (
        "".join(event["token"]["text"] for event in events if not event["token"]["special"])
        == events[-1]["generated_text"]
    )
    return events[-1]["generated_text"], events[-1]["details"]["finish_reason"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_over_http_are_json_of_their_schema(client: httpx.Client, name: str) -> None:
    grammar = {"type": "json", "value": SCHEMAS[name]}
    for parameters in ({}, {"temperature": 1.0, "seed": 3}):
        full = asked(client, grammar, max_new_tokens=150, **parameters).json()
        text, reason = streamed_text(asked(client, grammar, stream=True, max_new_tokens=150, **parameters))
        assert text == full["generated_text"]
        assert reason == full["details"]["finish_reason"]
        if reason == "eos_token":
            jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_other_forms_over_http(client: httpx.Client) -> None:
    answer = asked(client, {"type": "regex", "value": "[0-9]{3}-(yes|no)"}).json()
    assert re.fullmatch("[0-9]{3}-(yes|no)", answer["generated_text"])
    assert answer["details"]["finish_reason"] == "eos_token"
    named = {"type": "json_schema", "value": {"name": "choice", "schema": SCHEMAS["choices"]}}
    assert json.loads(asked(client, named).json()["generated_text"]) in SCHEMAS["choices"]["enum"]


def test_grammars_that_are_none_are_refused_over_http_and_the_server_lives_on(client: httpx.Client) -> None:
    deep: dict[str, Any] = nested_schema(500)
    for grammar in (
        {"type": "json", "value": {"$ref": "http://127.0.0.1/"}},
        {"type": "json", "value": {"type": "string", "pattern": "^((a{99}){99}){99}$"}},
        {"type": "json", "value": {"description": "x" * 10**6}},
        {"type": "json", "value": deep},
        {"type": "json", "value": {"enum": [f"value {i}" for i in range(50_000)]}},
        {"type": "regex", "value": "(a+)+("},
    ):
        refused = asked(client, grammar)
        assert refused.status_code == 422, refused.text
        assert refused.json()["error"].startswith("grammar: "), refused.text
        assert refused.json()["error_type"] == "validation"
    assert asked(client, {"type": "regex", "value": "(a|a)+b"}, max_new_tokens=20).status_code == 200


def test_an_answer_that_gets_too_complex_ends_with_an_error(client: httpx.Client) -> None:
    """A limit that is reached in the middle is not shown as a complete answer."""
    properties = {f"property {i}": {"type": "string"} for i in range(700)}
    inside = {"type": "object", "properties": properties}
    many = {"type": "json", "value": {"type": "object", "properties": {"a": inside}, "required": ["a"]}}
    failed = asked(client, many, max_new_tokens=200)
    assert failed.status_code == 424, failed.text
    assert failed.json()["error_type"] == "generation"
    events = asked(client, many, stream=True, max_new_tokens=200).text.splitlines()
    assert json.loads(events[-2].removeprefix("data:"))["error_type"] == "generation"


@pytest.mark.slow
def test_answers_of_a_full_cache_are_those_of_an_empty_one(tmp_path: Path) -> None:
    """Requests that are preempted and recomputed go on in their grammars where they stood."""
    sentence = {
        "type": "array",
        "items": {"type": "string", "minLength": 40, "maxLength": 60},
        "minItems": 3,
        "maxItems": 3,
    }
    grammar = {"type": "json", "value": sentence}
    with serving(tmp_path, [{"cache_memory": "8KiB"}]) as deployment, ThreadPoolExecutor(8) as threads:
        client = deployment.client()

        def ask(seed: int) -> str:
            answer = asked(client, grammar, max_new_tokens=800, temperature=1.0, seed=seed).json()
            assert answer["details"]["finish_reason"] == "eos_token"
            jsonschema.validate(json.loads(answer["generated_text"]), sentence)
            return str(answer["generated_text"])

        alone = [ask(seed) for seed in range(8)]
        assert list(threads.map(ask, range(8))) == alone
        preemptions = re.search(r"preemptions_total\S* (\d+)", client.get("/metrics").text)
        assert preemptions
        assert int(preemptions[1]) > 0
