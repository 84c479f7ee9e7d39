"""The runner of MindSpore Lite, on a stand-in for Lite's Python interface (``tests/fakes``). No device has run it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mindspore_lite
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lite_pairs import BLOCK_SIZE, DECODE, FAKES, TESTS, replace_manifest, write_pair, write_ranks, write_tokenizer
from paged_rows import Row, step
from serving_processes import serving, standin_deployment

from agent.arithmetic_model import BEGIN, END, ArithmeticModel, answer
from agent.lite_runner import LiteRunner
from agent.preflight import LaunchError, check
from agent.runner import RunnerBroken
from config.free_ports import free_ports
from config.manifest import ManifestError
from config.serving_config import LimitsConfig, ModelConfig, load

LIMITS = LimitsConfig(max_num_seqs=4, max_num_batched_tokens=64)


def config(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(
        path=str(folder), names=("pair",), agent_ports=(9,), target="ascend", runtime="mindspore_lite", **settings
    )


def open_pair(folder: Path, **settings: Any) -> LiteRunner:
    return LiteRunner(config(folder, **settings), LIMITS, rank=0, device=0)


def said(runner: LiteRunner, prompt: str, blocks: list[int], chunks: list[int]) -> str:
    """The greedy answer's first 20 bytes, or all of them; its prompt in steps of so many tokens."""
    row = Row(blocks, [BEGIN, *prompt.encode()])
    for length in chunks:
        logits = runner.run(step([row], [length], BLOCK_SIZE))
    text = bytearray()
    while len(text) < 20 and (token := int(logits.best()[0])) != END:
        row.tokens.append(token)
        text.append(token)
        logits = runner.run(step([row], [1], BLOCK_SIZE))
    return text.decode(errors="ignore")


# Generation C with fixed shapes and lengths as a column; generation D, whose prefill takes block tables too
FIXED = {
    "prefill": {"tokens": [1, 64], "batch_valid_length": [1, 1], "slot_mapping": [64]},
    "decode": {"tokens": [4, 1], "batch_valid_length": [4, 1], "block_tables": [4, 8], "slot_mapping": [4]},
}
ALIKE = {"prefill": DECODE | {"tokens": [-1, -1]}, "decode": DECODE, "padding_slot": -1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generation C with open shapes."""
    return write_pair(tmp_path_factory.mktemp("pairs") / "open")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the command made of the pairs of two ranks."""
    place = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "models.adopt", "--tokenizer", str(write_tokenizer(place / "tokenizer"))]
    for pair in write_ranks(place):
        command += ["--rank", *map(str, pair)]
    command += ["--context-length", "128", "--output", str(place / "pair")]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert "runtime: mindspore_lite, 2 agent_ports, rank_table: " in done.stdout
    return place / "pair"


@pytest.mark.parametrize("form", [{}, FIXED, ALIKE], ids=["open", "fixed", "alike"])
def test_answers_follow_the_rule(tmp_path: Path, form: dict[str, Any]) -> None:
    runner = open_pair(write_pair(tmp_path / "pair", **form))
    assert said(runner, "hi", blocks=[3, 4], chunks=[3]).startswith(answer("hi", 8))
    long = "a prompt that fills several blocks"
    assert said(runner, long, blocks=[9, 5, 7, 2], chunks=[1 + len(long)]).startswith(answer(long, 8))
    assert said(runner, long, blocks=[9, 5, 7, 2], chunks=[20, 1, len(long) - 20]).startswith(answer(long, 8))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_step_has_the_logits_of_the_model_that_it_stands_for(pair: Path, data: st.DataObject) -> None:
    """Prompts, chunks and single tokens in one step, with logits of every position."""
    runner = open_pair(pair)
    oracle = ArithmeticModel(Path("config/standin"), cache_bytes=1 << 20)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    rows = [Row(range(1 + 3 * i, 4 + 3 * i), [BEGIN, *os.urandom(length)]) for i, length in enumerate(lengths)]
    while any(left := [len(row.tokens) - row.computed for row in rows]):
        going = [row for row, rest in zip(rows, left, strict=True) if rest]
        taken = [data.draw(st.integers(1, rest)) for rest in left if rest]
        batch = step(going, taken, BLOCK_SIZE, every_position=True)
        assert runner.run(batch).best().tolist() == oracle.run(batch).best().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("alike", [False, True], ids=["paged", "alike"])
def test_a_pair_with_a_network_computes_what_the_reference_does(tmp_path: Path, alike: bool) -> None:
    """The stand-in runs graphs of standard operators with MindSpore, on the CPU."""
    import torch
    from paged_pairs import PairShape, write_paged_pair
    from tiny_checkpoints import VOCAB_SIZE, write_tiny

    from models.adopt import AdoptOptions, adopt

    reference = write_tiny("llama", tmp_path / "tiny")
    shape = PairShape() if alike else PairShape(prefill=(2, 16), decode=3, tables=8)
    paths = write_paged_pair(tmp_path / "tiny", tmp_path, alike=alike, shape=shape)
    adopt([paths], tmp_path / "tiny", tmp_path / "pair", AdoptOptions(target="ascend", context_length=32))
    limits = LimitsConfig(max_num_seqs=3, max_num_batched_tokens=16)
    runner = LiteRunner(config(tmp_path / "pair", cache_dtype="float32"), limits, rank=0, device=0)
    draw = np.random.default_rng(0)
    rows = [Row(range(1 + 5 * i, 6 + 5 * i), draw.integers(0, VOCAB_SIZE, 20).tolist()) for i in range(4)]
    for lengths in [(13, 1, 2, 7), (1, 2, 5, 1), (1, 1, 1, 1), (5, 5, 5, 5)]:
        batch = step(rows, lengths, shape.block_size, every_position=True)
        logits = iter(runner.run(batch).values)
        for row, length in zip(rows, lengths, strict=True):
            with torch.no_grad():
                expected = reference(torch.tensor([row.tokens[: row.computed]])).logits[0, -length:].numpy()
            for position in expected:
                assert np.abs(next(logits) - position).max() < 1e-3


def test_a_lost_cache_is_found_at_the_start(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_lite.ModelGroup, "add_model", lambda self, models: None)
    with pytest.raises(ManifestError, match="pair: prefill and decode do not share their cache"):
        open_pair(pair)


def test_a_call_that_fails_breaks_the_runner(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_pair(pair)

    def fail(*_: object) -> None:
        raise RuntimeError("device is lost\nat some place")

    monkeypatch.setattr(mindspore_lite.Model, "predict", fail)
    with pytest.raises(
        RunnerBroken, match=r"^decode of 1 row\(s\) of 1 token\(s\) with 8 blocks each: device is lost$"
    ):
        runner.run(step([Row([1], [5])], [1], BLOCK_SIZE))


def test_a_pair_that_lite_is_too_old_for_is_explained(tmp_path: Path) -> None:
    folder = write_pair(tmp_path / "pair", version=9)
    with pytest.raises(
        ManifestError, match=r"prefill.*: MindSpore Lite 2.7.0 does not build it: .*version.* MindIR needs"
    ):
        open_pair(folder)


def test_a_folder_whose_graph_takes_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_pair(tmp_path / "pair")
    graph = folder / "decode" / "rank_0_graph.mindir"
    graph.write_bytes(graph.read_bytes().replace(b"block_tables", b"block_stools"))
    replace_manifest(folder, files={})
    with pytest.raises(ManifestError, match=r"decode.*does not build it"):
        open_pair(folder)


def test_every_rank_has_its_files_and_its_place(
    two_ranks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "hccl.json"
    table.write_text("{}")
    caplog.set_level("INFO", "mindspore_lite")
    LiteRunner(config(two_ranks, rank_table=str(table)), LIMITS, rank=1, device=5)
    [prefill, decode] = [record.getMessage() for record in caplog.records if record.name == "mindspore_lite"]
    assert f"{two_ranks}/rank_1/prefill/graph.mindir for device 5, rank 1" in prefill
    assert f"'rank_table_file': '{table}'" in decode
    with pytest.raises(ManifestError, match=r"does not build it: .*collectives needs a rank_table_file"):
        LiteRunner(config(two_ranks), LIMITS, rank=0, device=0)


def test_a_missing_package_is_said_where_to_find(pair: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "mindspore_lite")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(place for place in sys.path if place != str(FAKES))])
    with pytest.raises(ManifestError, match=r"No module named 'mindspore_lite'; the wheel .* mindspore.cn"):
        open_pair(pair)
    deployment = standin_deployment(tmp_path, [model(pair)], limits=SERVED)
    with pytest.raises(LaunchError, match=r"models\[0\].runtime: mindspore_lite is not installed: the wheel"):
        check(load(deployment.config_path))
    (tmp_path / "mindspore_lite.py").write_text("raise ImportError('libgraph.so: cannot open shared object file')")
    importlib.invalidate_caches()
    with pytest.raises(ManifestError, match=r"libgraph.so: cannot open shared object file; run the set_env.sh of CANN"):
        open_pair(pair)


@pytest.fixture
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the stand-in where they would find MindSpore Lite."""
    monkeypatch.setenv("PYTHONPATH", str(FAKES))


def model(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "path": str(folder),
        "target": "ascend",
        "runtime": "mindspore_lite",
        "prefill_lengths": [16, 64, 128],
        "decode_rows": [1, 3],
    } | settings


SERVED = {"max_num_seqs": 3, "max_num_batched_tokens": 128}


def test_a_deployment_of_two_ranks_answers_by_the_rule(two_ranks: Path, tmp_path: Path, on_the_path: None) -> None:
    table = tmp_path / "hccl.json"
    table.write_text("{}")
    ranks = model(two_ranks, agent_ports=free_ports(2), rank_table=str(table))
    prompts = ["hi", "one", "a prompt that fills more than one block of the cache", "x" * 60]
    with serving(tmp_path, [ranks], limits=SERVED) as deployment, ThreadPoolExecutor() as threads:
        assert not list(tmp_path.glob("logs/rendezvous-*"))  # ranks of Lite have their table
        client = deployment.client()

        def ask(prompt: str) -> str:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 12, "do_sample": False}}
            text: str = client.post("/models/llama2", json=body).raise_for_status().json()["generated_text"]
            return text

        for prompt, text in zip(prompts, threads.map(ask, prompts), strict=True):
            assert answer(prompt, 20).startswith(text)
            assert text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"decode_rows": [1, 2]},
            r"decode_rows: decode: the gear for 3 row\(s\) of 1 token\(s\) with 8 blocks each is missing",
        ),
        ({"prefill_lengths": [64]}, r"prefill_lengths: prefill: the gear for 1 row\(s\) of 128 token\(s\) is missing"),
        ({"decode_rows": [], "decode_ini": "none.ini"}, "decode_ini: none.ini: cannot be read: .*No such file"),
        ({"rank_table": "none.json"}, "rank_table: none.json: no such file"),
        ({"cache_dtype": "float32"}, "cache_dtype: the graphs of pair hold a cache of float16"),
        ({"cache_memory": "1KB"}, "cache_memory: 1KB holds fewer than 32 blocks"),
        ({"path": "config/standin", "target": "ascend"}, "target: config/standin is exported for standin"),
    ],
)
def test_what_cannot_work_is_said_before_the_start(
    pair: Path, tmp_path: Path, on_the_path: None, settings: dict[str, Any], problem: str
) -> None:
    deployment = standin_deployment(tmp_path, [model(pair, **settings)], limits=SERVED)
    with pytest.raises(LaunchError, match=rf"^models\[0\].{problem}"):
        check(load(deployment.config_path))
