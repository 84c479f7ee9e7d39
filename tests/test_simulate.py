"""The simulator: a case that a person can compute, laws that hold for every queue, and its files and options."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import device, simulate, trace
from benchmarks.arrivals import Pattern, arrival_times
from benchmarks.device import Device
from benchmarks.replay import DISPATCHES, Limits, Outcome, replay
from benchmarks.simulate_report import cell_of
from benchmarks.trace import Job, Shape
from benchmarks.workload import lengths
from server.request import GenerationParams, Request
from server.step import Row, Step

# Every step takes 25 ms, and nothing else takes time.
FIXED = Device(
    name="25 ms a step",
    tokens_ms={1: 25.0},
    cached_us=0.0,
    pair_ns=0.0,
    own_pair_ns=0.0,
    row_ms=0.0,
    agent_ms=0.0,
    server_ms=0.0,
    block_size=16,
    cached_tokens=16 * 100,
    context_length=1600,
)
LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=128)


def job(arrival: float, prompt_tokens: int, output_tokens: int, **more: Any) -> Job:
    return Job(arrival, Shape(prompt_tokens=prompt_tokens, output_tokens=output_tokens, **more))


def milliseconds(outcomes: Sequence[Outcome]) -> list[list[float]]:
    """When the tokens of each came."""
    return [[pytest.approx(1e3 * at) for at in outcome.arrivals] for outcome in outcomes]


def load(count: int, rate: float, pattern: Pattern = "poisson", seed: int = 0) -> list[Job]:
    random = Random(seed)
    shapes = trace.drawn(
        count,
        lengths("lognormal:64:0.8"),
        lengths("uniform:1:40"),
        longest=FIXED.context_length,
        prefixes=2,
        prefix_tokens=32,
        priorities=[0, 0, -1],
        random=random,
    )
    times = arrival_times(pattern, rate, count, burst=20, random=random)
    return [Job(*one) for one in zip(times, shapes, strict=True)]


def test_the_tokens_of_two_requests_come_when_a_person_says() -> None:
    # The first is alone: its prompt runs 0-25, and its second token was planned at once, 25-50. The other one comes at
    # 10 and is seen at 25, when the answer to the first step makes room to plan a third: that runs 50-75.
    outcomes, totals = replay([job(0.0, 20, 4), job(0.010, 30, 2)], FIXED, LIMITS)
    assert milliseconds(outcomes) == [[25, 50, 75, 100], [75, 100]]
    assert [1e3 * outcome.answer.first for outcome in outcomes] == pytest.approx([25, 65])
    assert [1e3 * outcome.queued for outcome in outcomes] == pytest.approx([0, 15])
    assert (totals.steps, totals.rows, totals.wasted_rows) == (4, 6, 0)
    assert totals.busy == totals.end == pytest.approx(0.1)


def test_a_prompt_beyond_the_budget_takes_several_steps_beside_the_decoding_row() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=11)
    outcomes, totals = replay([job(0.0, 11, 5), job(0.010, 20, 1)], FIXED, limits)
    # Ten tokens of the long prompt have room beside the first request's row, in the steps that end at 75 and 100.
    assert milliseconds(outcomes) == [[25, 50, 75, 100, 125], [100]]
    assert totals.computed_tokens == 11 + 4 + 20


def test_a_row_that_turns_out_to_have_ended_runs_once_more_for_nothing() -> None:
    outcomes, totals = replay([job(0.0, 5, 2)], FIXED, replace(LIMITS, max_new_tokens=50))
    assert milliseconds(outcomes) == [[25, 50]]
    assert (totals.steps, totals.wasted_rows, totals.end) == (3, 1, pytest.approx(0.075))


def test_the_device_waits_for_agent_and_server_only_where_it_must() -> None:
    slow = msgspec.structs.replace(FIXED, agent_ms=5.0, server_ms=2.0)
    outcomes, totals = replay([job(0.0, 5, 3)], slow, LIMITS)
    # Planned at 2; the second step is planned meanwhile, and the third too, so only the agent's time lies between.
    assert milliseconds(outcomes) == [[32, 62, 92]]
    assert totals.busy == pytest.approx(0.075)
    hasty = msgspec.structs.replace(FIXED, tokens_ms={1: 1.0}, server_ms=4.0)
    outcomes, _ = replay([job(0.0, 5, 4)], hasty, LIMITS)
    # Plans are sent at 4, 8, 12 and 16, and answers looked at in between: it is the server that sets the pace.
    assert milliseconds(outcomes) == [[8, 12, 16, 17]]


def test_a_step_takes_the_time_of_its_tokens_its_context_and_its_rows() -> None:
    made = Device(
        name="",
        tokens_ms={1: 10.0, 11: 20.0, 21: 25.0},
        cached_us=2.0,
        pair_ns=3.0,
        own_pair_ns=5.0,
        row_ms=0.5,
        agent_ms=0.0,
        server_ms=0.0,
        block_size=16,
        cached_tokens=1600,
        context_length=1600,
    )
    assert [made.tokens_time(count) for count in (1, 6, 11, 16, 21, 41)] == [10, 15, 20, 22.5, 25, 35]
    one = Request(request_id="", prompt_ids=[1], params=GenerationParams(), arrival=0.0, max_new_tokens=1)
    step = Step(1, (Row(one, 1000, 1, True), Row(one, 200, 10, False)))
    pairs = 1e-9 * (3 * (1000 + 2000) + 5 * 45)
    assert made.step_seconds(step) == pytest.approx(0.020 + 1200 * 2e-6 + pairs + 0.0005)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    seats=st.integers(1, 12),
    budget=st.sampled_from([16, 64, 1600]),
    blocks=st.integers(100, 140),
    kinds=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    groups=st.integers(1, 3),
    asked=st.sampled_from([None, 60]),
)
def test_nothing_is_lost_and_nothing_is_faster_than_the_device(
    seed: int,
    rate: float,
    seats: int,
    budget: int,
    blocks: int,
    kinds: tuple[bool, bool, bool],
    groups: int,
    asked: int | None,
) -> None:
    chunks, mixed, prefix_caching = kinds
    limits = Limits(
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        chunks=chunks,
        mixed=mixed,
        prefix_caching=prefix_caching,
        cached_tokens=16 * blocks,
        data_parallel=groups,
        max_new_tokens=asked,
    )
    jobs = load(40, rate, "bursts" if seed % 2 else "poisson", seed)
    outcomes, totals = replay(jobs, FIXED, limits)
    assert len(outcomes) + totals.refused == len(jobs)
    assert chunks or budget < 1600 or not totals.refused
    for outcome in outcomes:
        assert len(outcome.arrivals) == outcome.job.shape.output_tokens
        assert outcome.job.arrival <= outcome.admitted < outcome.arrivals[0]
        assert all(gap >= 0.025 - 1e-9 for gap in outcome.answer.gaps)
    preempted = sum(outcome.num_preemptions for outcome in outcomes)
    cached = sum(outcome.num_cached_tokens for outcome in outcomes)
    needed = sum(outcome.job.shape.prompt_tokens + len(outcome.arrivals) - 1 for outcome in outcomes)
    assert totals.computed_tokens >= needed - cached
    assert preempted or totals.computed_tokens == needed - cached + totals.wasted_rows
    assert totals.busy <= groups * totals.seconds + 1e-9
    assert not (cached and not (chunks and prefix_caching))


def test_the_queue_obeys_littles_law() -> None:
    jobs = load(1500, 10.0)
    outcomes, totals = replay(jobs, FIXED, LIMITS)
    cell, values = cell_of(outcomes, totals, {}, 10.0)
    # Requests in the system = requests a second x seconds in it. A request is seen up to a step after its arrival.
    by_law = cell.requests_per_second * sum(values["E2E"]) / len(outcomes) / 1e3
    assert cell.in_system == pytest.approx(by_law, rel=0.05)
    assert cell.utilisation == pytest.approx(totals.steps * 0.025 / totals.seconds)
    assert 0.9 < cell.utilisation <= 1
    assert 0 < cell.cache_used < 1


def test_twice_the_same_is_the_same() -> None:
    first, again = (replay(load(200, 8.0), FIXED, LIMITS) for _ in range(2))
    assert first == again


def test_an_urgent_request_waits_less_and_a_shared_begin_is_computed_once() -> None:
    jobs = [job(0.0, 100, 40, prefix="a", prefix_tokens=64) for _ in range(16)]
    jobs += [job(0.0, 100, 40, prefix="a", prefix_tokens=64, priority=-1)]
    outcomes, totals = replay(jobs, FIXED, LIMITS)
    cell, _ = cell_of(outcomes, totals, {}, None)
    urgent, usual = cell.ttft_by_priority[-1], cell.ttft_by_priority[0]
    assert urgent
    assert usual
    assert urgent.max == pytest.approx(25)
    assert usual.max > 1000
    assert [outcome.num_cached_tokens for outcome in outcomes].count(64) >= 14
    apart, _ = replay(jobs, FIXED, replace(LIMITS, prefix_caching=False))
    assert {outcome.num_cached_tokens for outcome in apart} == {0}


def test_two_groups_answer_two_requests_as_each_alone() -> None:
    outcomes, totals = replay([job(0.0, 20, 4), job(0.010, 30, 2)], FIXED, replace(LIMITS, data_parallel=2))
    assert milliseconds(outcomes) == [[25, 50, 75, 100], [35, 60]]
    assert (totals.steps, totals.rows, totals.busy) == (6, 6, pytest.approx(0.15))


def test_the_rules_of_dispatch_do_what_their_names_say() -> None:
    # The prefix is known at 25 ms to the group that the first request went to, which has another two requests by then.
    prefix: dict[str, Any] = {"prefix": "a", "prefix_tokens": 640}
    jobs = [
        job(0.0, 650, 4, **prefix),
        job(0.0, 10, 80),
        job(1.0, 10, 80),
        job(1.1, 10, 80),
        job(1.2, 650, 2, **prefix),
    ]
    limits = replace(LIMITS, max_num_batched_tokens=1000, data_parallel=2)
    known = {}
    for dispatch in DISPATCHES:
        outcomes, _ = replay(jobs, FIXED, replace(limits, dispatch=dispatch))
        known[dispatch] = outcomes[-1].num_cached_tokens
    assert known == {"prefix_aware": 640, "least_loaded": 0, "round_robin": 640}


@pytest.mark.parametrize("name", device.presets())
def test_a_preset_is_what_it_says(name: str) -> None:
    made = device.load(name)
    assert made.cached_tokens % made.block_size == 0
    assert made.cached_tokens >= made.context_length


def test_the_first_preset_gives_back_what_was_published() -> None:
    made = device.load("llama2_7b_910b4")
    published = {
        128: (35, 21, 17, 13, 11),
        256: (44, 31, 23, 21, 20),
        512: (63, 47, 44, 42, 41),
        1024: (93, 84, 83, 83, 82),
    }
    for tokens, each in published.items():
        for batch, milliseconds in zip((1, 2, 4, 8, 16), each, strict=True):
            assert made.tokens_time(batch * tokens) / batch == pytest.approx(milliseconds, rel=0.1)
    assert made.tokens_time(1) == 22.5


def test_the_second_preset_gives_back_what_was_measured() -> None:
    made = device.load("smollm2_135m_2_cores")
    one = Request(request_id="", prompt_ids=[1], params=GenerationParams(), arrival=0.0, max_new_tokens=1)
    prompt = made.step_seconds(Step(1, (Row(one, 0, 1000, True),)))
    assert 1e3 * prompt + made.agent_ms == pytest.approx(655, rel=0.05)
    for rows, token in ((1, 7.8), (8, 11.8), (64, 55.3)):
        decode = made.step_seconds(Step(1, tuple(Row(one, 150, 1, True) for _ in range(rows))))
        assert 1e3 * decode + made.agent_ms == pytest.approx(token, rel=0.15), rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "name"),
        ({"tokens_ms": {20: 1, 10: 2}}, "tokens_ms: needs tokens in rising order"),
        ({"tokens_ms": {10: 2, 20: 1}}, "times that do not fall"),
        ({"tokens_ms": {}}, "rising order"),
        ({"speed": 3}, "unknown field `speed`"),
        ({"row_ms": -1}, "row_ms"),
    ],
)
def test_a_device_file_that_is_wrong_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(msgspec.structs.asdict(FIXED), sort_keys=False), encoding="utf-8")
    assert device.load(str(path)) == FIXED
    path.write_text(yaml.safe_dump({**msgspec.structs.asdict(FIXED), **change}, sort_keys=False), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        device.load(str(path))


def test_a_device_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "made.yaml").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"made.yaml: .*expected"):
        device.load(str(tmp_path / "made.yaml"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no requests"),
        ('{"prompt_tokens": 5}', "line 1: .*output_tokens"),
        ('{"prompt_tokens": 5, "output_tokens": 0}', "line 1"),
        ('{"prompt_tokens": 5, "output_tokens": 1, "prefix": "a", "prefix_tokens": 6}', "within the prompt"),
        ('{"prompt_tokens": 5, "output_tokens": 1, "prefix_tokens": 5}', "a prefix has a name"),
        ('{"prompt_tokens": 5, "output_tokens": 1, "arrival": 1}\n{"prompt_tokens": 5, "output_tokens": 1}', "either"),
    ],
)
def test_a_trace_that_is_wrong_is_named(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        trace.from_file(path)


def test_a_sweep_makes_a_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sweep", "max_num_seqs=2,16", "--sweep", "prefix_caching=false", "--rate", "1,3", "-n", "30"]
    words += ["--priorities=-1,0", "--output-tokens", "uniform:5:20", "--output", str(tmp_path / "made")]
    assert simulate.main(words) == 0
    shown = capsys.readouterr().out
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[1:5]] == [
        ["| 2", "false", "1"],
        ["| 16", "false", "1"],
        ["| 2", "false", "3"],
        ["| 16", "false", "3"],
    ]
    assert len(rows) == 1 + 4 + 1 + 8
    cells = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert [cell["requests"] for cell in cells] == [30] * 4
    assert cells[2]["queue"]["p99"] > cells[3]["queue"]["p99"]
    for latency in ("ttft", "tpot"):
        picture = ElementTree.parse(tmp_path / f"made.{latency}.svg")
        assert len(picture.findall(".//{*}polyline")) == 2


def test_a_trace_is_replayed_as_it_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    lines = ['{"prompt_tokens": 9, "output_tokens": 3, "arrival": 2}', '{"prompt_tokens": 5000, "output_tokens": 1}']
    path.write_text("\n".join([lines[0], lines[1].replace("}", ', "arrival": 1}')]), encoding="utf-8")
    assert simulate.main(["--file", str(path), "--output", str(tmp_path / "made")]) == 0
    assert "| file |" in (shown := capsys.readouterr().out)
    assert "1 requests are too long" in shown
    assert len(ElementTree.parse(tmp_path / "made.svg").findall(".//{*}polyline")) == 4
    assert simulate.main(["--file", str(path), "--rate", "2"]) == 2
    assert "leave --rate out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep", "seats=3"], "'seats' is none of max_num_seqs"),
        (["--sweep", "max_num_seqs=0"], "max_num_seqs: 0 is not above 0"),
        (["--sweep", "mixed=maybe"], "neither true nor false"),
        (["--sweep", "dispatch=random"], "'random' is none of prefix_aware, least_loaded, round_robin"),
        (["--rate", "0"], "not above 0"),
        (["--device", "tpu"], "presets are"),
        (["--input-tokens", "many"], "no distribution"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        simulate.main(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--burst", "4"], "--burst 4 is of --arrivals bursts, not of --arrivals poisson"),
        (["--prefixes", "4"], "--prefixes 4 are of so many tokens as --prefix-tokens says"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate.main(words) == 2
    assert message in capsys.readouterr().err
