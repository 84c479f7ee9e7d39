"""What a load client is asked: its command line, lengths and prompt files."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from serving_processes import ROOT
from tokenizers import Tokenizer

from benchmarks import serve, serve_options
from benchmarks.prompts import Prompt
from benchmarks.workload import drawn, from_file, lengths

TOKENIZER = ROOT / "config" / "standin" / "tokenizer.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "0 is not above 0"),
        (["--rate", "nan"], "not above 0"),
        (["-c", "1.5"], "1.5"),
        (["-c", "0"], "0 is not above 0"),
        (["-c", "1", "--warm-up", "-1"], "-1 is below 0"),
        (["-c", "1", "--rate", "1"], "not allowed with"),
        ([], "one of the arguments"),
        (["-c", "1", "--slo", "x:1"], "limits are written NAME:MILLISECONDS"),
        (["-c", "1", "--slo", "ttft"], "'ttft' has no number of milliseconds: limits are written NAME:MILLISECONDS"),
        (["-c", "1", "--extra", "[]"], "no JSON object"),
        (["-c", "1", "--extra", '{"temperature": NaN}'], "NaN is no number of JSON"),
        (["-c", "1", "--tokenizer", "/nowhere"], "No such file"),
        (["-c", "1", "--tokenizer", str(ROOT / "setup.py")], "is no tokenizer.json"),
        # What would change nothing
        (["-c", "1", "--arrivals", "bursts"], "--arrivals bursts is of an open loop, --rate; with --concurrent"),
        (["-c", "1", "--arrivals", "poisson"], "--arrivals poisson is of an open loop"),
        (["-c", "1", "--burst", "4"], "--burst 4 is of an open loop, --rate with --arrivals bursts"),
        (["--rate", "1", "--burst", "8"], "--burst 8 is of --arrivals bursts, not of --arrivals poisson"),
        (["--rate", "1", "--burst", "8", "--arrivals", "steady"], "not of --arrivals steady"),
        (["-c", "65"], "--concurrent 65 is more than --requests 64"),
        (["-c", "1", "--ca", "x.pem"], "--ca x.pem is for https, and the URL is http://test"),
        (["-c", "1", "--protocol", "tgi", "--model", "m"], "--model m cannot be said in --protocol tgi"),
        (["-c", "1", "--input-tokens", "5"], "--input-tokens needs --tokenizer"),
        (["-c", "1", "--input-tokens", "5", "--tokenizer", str(TOKENIZER), "--file", "x"], "--file has its own"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serve_options.options("A load.", ["http://test", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_not_said_has_the_usual_value() -> None:
    found = serve_options.options("A load.", ["http://test", "--rate", "4", "--arrivals", "bursts"])
    assert (found.model, found.burst, serve.description(found)) == ("llama2", 8, "4 a second, bursts of 8")
    found = serve_options.options("A load.", ["http://test", "--rate", "4", "--protocol", "tgi"])
    assert serve.description(found) == "4 a second, poisson"


@pytest.mark.parametrize(("text", "low", "high"), [("5", 5, 5), ("uniform:3:9", 3, 9), ("lognormal:100:0.5", 1, 5000)])
def test_lengths_are_drawn(text: str, low: int, high: int) -> None:
    found = sorted(lengths(text)(random) for random in [Random(1)] for _ in range(2000))
    assert low <= found[0] <= found[-1] <= high
    if text.startswith("uniform"):
        assert (found[0], found[-1]) == (low, high)
    if text.startswith("lognormal"):
        assert found[1000] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "uniform:3", "uniform:9:3", "uniform:1:2.5", "5:5", "normal:1:2", "1" * 9]
)
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"lengths|longest"):
        lengths(text)


def test_drawn_prompts_are_as_long_as_drawn_and_begin_each_in_its_own_way() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    found = drawn(tokenizer, 4, lengths("5000"), lengths("uniform:2:4"), Random(3))
    assert [len(tokenizer.encode(prompt.text, add_special_tokens=False).ids) for prompt in found] == [5000] * 4
    assert len({prompt.text[:12] for prompt in found}) == 4
    assert all(2 <= prompt.new_tokens <= 4 for prompt in found)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('[{"prompt": "é\u2028", "output_tokens": 5}, {"text": "b", "output_len": 6}]', encoding="utf-8")
    assert from_file(path, None) == [Prompt("é\u2028", 5), Prompt("b", 6)]
    path.write_text('{"inputs": "a\u2028", "max_tokens": 5}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert from_file(path, 9) == [Prompt("a\u2028", 5), Prompt("b", 9)]
    path.write_text('\ufeff{"prompt": "你好 🙂", "output_tokens": 5}\r\n', encoding="utf-8")
    assert from_file(path, None) == [Prompt("你好 🙂", 5)]
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="prompts is not UTF-8 at byte 12"):
        from_file(path, 9)
    for text, message in {
        "": r'holds no prompts: objects like {"prompt": ',
        '{"prompt": "\\ud83d", "max_tokens": 1}': "line 1: the text holds a lone surrogate",
        '{"prompt": "b"}': "line 1: a number of tokens",
        '{"prompt": "b", "max_tokens": 0}': "line 1: a number of tokens",
        '{"prompt": "a", "max_tokens": 1}\n{"max_tokens": 5}': "line 2: an object with a text",
        '["a"]': "entry 1: an object",
        "[1": "no JSON",
    }.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            from_file(path, None)
