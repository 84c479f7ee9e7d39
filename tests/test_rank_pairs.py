"""The pairs of several ranks are adopted as one model, or the first rank that does not fit is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lite_pairs import write_ranks, write_tokenizer
from mindspore.train.mind_ir_pb2 import ModelProto, ValueInfoProto

from config.manifest import read_manifest, verify_rank
from models import adopt, mindir
from models.contract import explain, obstacles, read_contract

Pair = tuple[Path, Path]


@pytest.fixture
def ranks(tmp_path: Path) -> list[Pair]:
    return write_ranks(tmp_path / "exported", ranks=3)


def run(ranks: list[Pair], folder: Path, *options: str) -> int:
    """Adopt with the command, into ``folder / "model"``."""
    tokenizer = folder / "tokenizer"
    words = ["--tokenizer", str(tokenizer if tokenizer.exists() else write_tokenizer(tokenizer))]
    for pair in ranks:
        words += ["--rank", *map(str, pair)]
    return adopt.main([*words, "--output", str(folder / "model"), *options])


def change(path: Path, how: Callable[[ModelProto], Any]) -> None:
    model = mindir.read(path)
    how(model)
    path.write_bytes(model.SerializeToString())


def test_the_ranks_of_a_model_become_one_folder(
    ranks: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ranks, tmp_path) == 0
    said = capsys.readouterr().out
    assert "target: ascend, cache_dtype: float16, cache_memory: 2048B or more, runtime: mindspore_lite, 3 agent" in said
    manifest = read_manifest(tmp_path / "model")
    assert manifest.pair
    assert (manifest.world_size, manifest.cache_heads, manifest.num_kv_heads, manifest.target) == (3, 1, 3, "ascend")
    for rank, (prefill, decode) in enumerate(ranks):
        own = verify_rank(tmp_path / "model", manifest, rank)
        assert own == tmp_path / "model" / f"rank_{rank}"
        assert (own / manifest.pair.prefill.file).samefile(prefill)
        assert (own / manifest.pair.decode.file).samefile(decode)
        assert (own / "decode" / f"rank_{rank}_variables" / "data_0").read_bytes() == bytes([rank, 0, 0, 0])


def smaller_cache(model: ModelProto) -> None:
    model.graph.parameter[0].dims[2] = 2
    model.graph.parameter[1].dims[2] = 2


def smaller_vocabulary(model: ModelProto) -> None:
    model.graph.output[0].tensor[0].dims[1] = 130


def fixed_lengths(model: ModelProto) -> None:
    model.graph.input[1].tensor[0].dims[:] = [4]


def whole(model: ModelProto) -> None:
    del model.graph.node[:]


def without_outputs(model: ModelProto) -> None:
    del model.graph.output[:]
    model.graph.parameter[2].name = "graph:lm_head"


def other_generation(model: ModelProto) -> None:
    tokens, lengths, slots = list(model.graph.input)
    tables = ValueInfoProto(name="graph:block_tables")
    tables.tensor.add(data_type=tokens.tensor[0].data_type, dims=[-1, -1])
    del model.graph.input[:]
    model.graph.input.extend([tokens, lengths, tables, slots])


@pytest.mark.parametrize(
    ("wrong", "changed", "problem"),
    [
        (
            smaller_cache,
            2,
            "rank 1: caches: 2 like float16 [32, 16, 2, 1], and in rank 0 2 like float16 [32, 16, 1, 1]",
        ),
        (smaller_vocabulary, 2, "rank 1: vocabulary: 130 tokens, and in rank 0 261 tokens"),
        (fixed_lengths, 1, "rank 1: inputs of prefill: tokens int32 [-1, -1], batch_valid_length int32 [4], slot_mapp"),
        (whole, 2, "computes with no other rank: it is no part of a model but a whole one"),
        (
            other_generation,
            1,
            "rank 1: kind: generation D: paged, the same four inputs in both graphs, and in rank 0 g",
        ),
        (
            smaller_cache,
            1,
            "But the two do not belong together: key_cache is key_cache float16 [32, 16, 2, 1] in prefi",
        ),
    ],
)
def test_the_first_rank_that_does_not_fit_is_named(
    wrong: Callable[[ModelProto], Any],
    changed: int,
    problem: str,
    ranks: list[Pair],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``changed`` is of how many graphs of a rank; rank 2 is wrong as rank 1 is."""
    for pair in ranks[1:]:
        for path in pair[:changed]:
            change(path, wrong)
    assert run(ranks, tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("adopt: rank 1: ")
    assert problem in said
    assert not (tmp_path / "model").exists()


def test_a_vocabulary_that_only_weights_could_tell_is_not_guessed(
    ranks: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in ranks:
        for path in pair:
            change(path, without_outputs)
    assert run(ranks, tmp_path) == 1
    assert "rank 0: its outputs do not say how large the vocabulary is" in capsys.readouterr().err


def test_ranks_have_an_order_and_are_there_once(
    ranks: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([ranks[0], ranks[2], ranks[1]], tmp_path) == 1
    assert "rank 1: " in (said := capsys.readouterr().err)
    assert "rank_2_graph.mindir is called that of rank 2: give the ranks in their order" in said
    assert run([ranks[0], ranks[1], ranks[1]], tmp_path) == 1
    assert "rank 2: its prefill file is that of rank 1" in capsys.readouterr().err


def test_a_copy_of_a_rank_is_no_rank(ranks: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies = tmp_path / "copies"
    for path in ranks[0]:
        shutil.copytree(path.parent, copies / path.parent.name)
    copy = copies / ranks[0][0].parent.name / ranks[0][0].name, copies / ranks[0][1].parent.name / ranks[0][1].name
    assert run([ranks[0], ranks[1], copy], tmp_path) == 1
    assert "has the numbers of rank 0 in every weight: it is a copy" in capsys.readouterr().err


def test_a_rank_alone_is_explained(ranks: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = read_contract(*ranks[0])
    assert not list(obstacles(contract, "mindspore_lite"))
    for way in ("ascend", "cpu"):
        assert "it is one of several ranks (it uses AllReduce)" in next(obstacles(contract, way))  # type: ignore[arg-type]
    said = explain(contract)
    assert "--rank PREFILL DECODE for each in the order of the ranks" in said
    assert "Only MindSpore Lite on Ascend runs that (runtime: mindspore_lite)" in said
    assert "\n" not in said
    assert run(ranks[:1], tmp_path) == 1
    assert said in capsys.readouterr().err
    assert run(ranks, tmp_path, "--target", "cpu") == 1
    assert "adopt: --target cpu: ranks of another exporter run with MindSpore Lite" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["prefill.mindir"], ["a", "b", "--rank", "c", "d"]])
def test_a_pair_is_given_in_one_way(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        adopt.main(["--tokenizer", "t", "--output", str(tmp_path / "model"), *words])
    assert "give prefill and decode, or --rank PREFILL DECODE for each rank" in capsys.readouterr().err
