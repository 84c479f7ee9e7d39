"""What the benchmarks compute from what they measure; the load client on a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import stream
from tokenizers import Tokenizer

from benchmarks import load, operators, picture, prompts, publish, quality, report, result_files, streaming_cost
from benchmarks.exchange import LoadError
from benchmarks.latency import Answer
from benchmarks.load import Load
from benchmarks.machine import Machine
from benchmarks.prompts import Prompt
from benchmarks.report import Comparison, Measured
from benchmarks.target import Target
from config.free_ports import free_ports
from kernels import library
from kernels.library import Library

ROOT = Path(__file__).parent.parent


def test_an_answer_of_other_than_the_tokens_that_were_asked_for_is_an_error() -> None:
    text, usage = {"choices": [{"text": "hi"}]}, {"choices": [], "usage": {"completion_tokens": 3}}
    pieces = [(1.5, b"".join(stream(text, usage)))]
    assert load.answer_of("openai", Prompt("", 3), 1.0, pieces) == Answer(3, 1.0, (1.5,))
    with pytest.raises(LoadError, match="3 tokens instead of 4"):
        load.answer_of("openai", Prompt("", 4), 1.0, pieces)


def test_the_times_of_a_load() -> None:
    answers = [Answer(3, 0.0, (1.0, 1.5, 2.0)), Answer(1, 0.0, (3.0,))]
    found = load.summary(answers, concurrent=2, seconds=4.0, client_cpu=0.1)
    assert (found.tokens, found.tokens_per_second) == (4, 1.0)
    assert (found.first_p50, found.first_p99, found.token_p50, found.gap_p99) == (3000, 3000, 500, 500)


def test_a_load_on_a_server_counts_its_tokens(client: httpx.Client) -> None:
    target = Target("ours", str(client.base_url).rstrip("/"), "llama2")
    found = asyncio.run(load.measure(target, [Prompt("hi", 5), Prompt("there", 7), Prompt("you", 3)], concurrent=2))
    assert (found.requests, found.tokens) == (3, 15)
    with pytest.raises(LoadError, match="404"):
        asyncio.run(load.measure(Target("ours", target.url, "nobody"), [Prompt("hi", 5)], concurrent=1))


def test_the_prompts_are_many_and_their_answers_as_long_as_instructions_have_them() -> None:
    short = prompts.short_prompts()
    assert len(short) >= 64
    assert len({prompt.text for prompt in short}) == len(short)
    assert all(0 < prompt.new_tokens <= 256 and len(prompt.text) < 400 for prompt in short)
    assert prompts.first(len(short) + 2)[-1] == short[1]


def test_long_prompts_are_long_and_begin_each_in_its_own_way() -> None:
    tokenizer = Tokenizer.from_file(str(ROOT / "config" / "standin" / "tokenizer.json"))
    found = prompts.long_prompts(tokenizer, 3, tokens=1000, new_tokens=2, start=100)
    assert len({prompt.text[:9] for prompt in found}) == 3
    assert all(abs(len(tokenizer.encode(prompt.text, add_special_tokens=False).ids) - 1000) <= 1 for prompt in found)


def one_load(concurrent: int, speed: float) -> Load:
    return load.summary([Answer(2, 0.0, (0.1, 0.1 + 1 / speed))], concurrent, 2 / speed, 0.0)


def comparison() -> Comparison:
    def server(name: str, factor: float) -> Measured:
        loads = [one_load(concurrent, factor * 10 * concurrent) for concurrent in (1, 8)]
        return Measured(name=name, weight_bytes=10**9, memory_bytes=2**30, loads=loads, long_ms=100 / factor)

    return Comparison(
        machine=Machine(cpu="Some CPU", cores=2, read_gb=20.0, gflops=100.0, instructions="AVX2"),
        model="tiny",
        rounds=2,
        start_seconds=3.0,
        servers=[server("ours", 3.0), server("vllm", 1.0)],
        llamacpp={1: 20.0},
    )


def test_the_table_compares_with_both_peers_and_the_floor() -> None:
    lines = report.table(comparison()).splitlines()
    row = next(line for line in lines if line.startswith("| this server | 1 |"))
    assert [cell.strip() for cell in row.split("|")[-4:-1]] == ["3.00 x", "1.50 x", "150 %"]  # 50 ms of a 33 ms step
    assert "| this server | 33 ms | 3.00 x |" in lines
    assert {line.count("|") for line in lines if line.startswith(("| vLLM | ", "| llama"))} == {12, 4}


def test_results_are_read_back_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    assert all(path.stat().st_size for path in report.write(comparison()))
    assert report.read() == comparison()
    drawn = ElementTree.fromstring((tmp_path / "latest.svg").read_text(encoding="utf-8"))
    assert {"30", "240", "80", "20"} <= {text.text for text in drawn.iter() if text.tag.endswith("text")}


def test_a_picture_of_nothing_and_of_marks_is_still_a_picture() -> None:
    drawn = picture.bars("<&>", ["a"], {"one": [None], "two": [0.0]})
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_readmes_in_both_languages_get_the_same_numbers() -> None:
    tables = [publish.readme_table(comparison(), words) for words in publish.READMES.values()]
    assert tables[0] != tables[1]
    assert [line.split("|")[2:] for line in tables[0].splitlines()[1:]] == [
        line.split("|")[2:] for line in tables[1].splitlines()[1:]
    ]


def test_only_what_is_between_the_marks_is_replaced() -> None:
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    assert publish.replaced(text, "one", r"new \1") == "a\n<!-- one -->\nnew \\1\n<!-- /one -->\nb\n"
    with pytest.raises(ValueError, match="not one place"):
        publish.replaced(text, "two", "")


def test_the_documents_have_a_place_for_every_table() -> None:
    document = publish.DOCUMENT.read_text(encoding="utf-8")
    for name in (*publish.TABLES, *publish.WITHOUT_AVX512.values()):
        assert publish.replaced(document, name, "x") != document
    for readme in publish.READMES:
        assert "<!-- table -->" in (ROOT / readme).read_text(encoding="utf-8")


@given(st.lists(st.integers(0, 3), min_size=1), st.integers(0, 9))
def test_the_common_length_ends_at_the_first_difference(tokens: list[int], place: int) -> None:
    other = list(tokens)
    if place < len(tokens):
        other[place] += 1
    assert quality.common_length(tokens, other) == min(place, len(tokens))
    assert quality.standard_error([1.0, 3.0]) == pytest.approx(1.0)


def test_a_delay_is_counted_from_the_step_before() -> None:
    assert streaming_cost.delays([1.0, 2.0, 3.0], [1.25, 2.5, 2.75, 9.0]) == [0.25, 0.5, 0.75, 6.0]


@pytest.mark.slow
def test_the_cost_of_streams_is_measured() -> None:
    measure = "import asyncio; from benchmarks import streaming_cost; asyncio.run(streaming_cost.run(0.5))"
    done = subprocess.run([sys.executable, "-c", measure], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert [row.count("|") for row in rows] == [6] * len(streaming_cost.PROTOCOLS)
    milliseconds = [float(cell.split()[0]) for row in rows for cell in row.split("|")[2:-1]]
    assert all(number > 0 for number in milliseconds)


def test_an_operator_is_called_with_each_of_as_many_weights_as_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "COLD_BYTES", 3 * 576 * 960 * 4)
    operator = operators.OPERATORS[0]
    weights = operators.cold_weights(operator, "float32")
    assert [weight.shape for weight in weights] == [(960, 576)] * 3
    calls = operators.linear_calls(Library(library.build()), operator, weights, tokens=2)
    assert len(calls) == 3
    assert operators.fastest(calls) > 0


def test_a_table_makes_its_folder(tmp_path: Path) -> None:
    [path] = result_files.write(tmp_path / "new" / "folder" / "busy", {".md": "| a |\n"})
    assert path == tmp_path / "new" / "folder" / "busy.md"
    assert path.read_text(encoding="utf-8") == "| a |\n"


def test_a_load_that_cannot_be_measured_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["load", "openai", f"http://127.0.0.1:{free_ports(1)[0]}"])
    assert load.main() == 1
    assert "no connection to http://127.0.0.1:" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["load", "openai", "http://test", "-c", "0"])
    with pytest.raises(SystemExit):
        load.main()
    assert "0 is not above 0" in capsys.readouterr().err
