"""Pairs of MindIR files of every generation are told apart from the files alone, and explained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import foreign_graphs
import pytest
from mindspore.train.mind_ir_pb2 import ModelProto

from config.manifest import GraphTensor
from models import contract, mindir
from models.ascend_graphs import input_names
from models.contract import Way, explain, mismatches, obstacles, read_contract
from models.generations import CONTRACTS, classify

ROOT = Path(__file__).resolve().parent.parent
MINDFORMERS = os.environ.get("MINDFORMERS_PAIR")  # a folder with a pair that MindFormers exported for Ascend

Pair = tuple[Path, Path]


def tensors(*inputs: tuple[str, str, tuple[int, ...]]) -> list[GraphTensor]:
    return [GraphTensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape in inputs]


def paged(rows: int, width: int, blocks: int, lengths: tuple[int, ...], *, tables: bool) -> list[GraphTensor]:
    """Inputs of a paged graph; -1 is dynamic."""
    slots = rows * width if min(rows, width) > 0 else -1
    inputs = tensors(
        ("tokens", "int32", (rows, width)),
        ("batch_valid_length", "int32", lengths),
        ("block_tables", "int32", (rows, blocks)),
        ("slot_mapping", "int32", (slots,)),
    )
    return inputs if tables else [inputs[0], inputs[1], inputs[3]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Files of generation B."""
    return foreign_graphs.continuous(tmp_path_factory.mktemp("continuous"))


def changed(pair: Pair, folder: Path, change: Callable[[ModelProto], Any], *, only: int | None = None) -> Pair:
    """Copies of the files of which one or both are changed."""
    copies = folder / "prefill.mindir", folder / "decode.mindir"
    for i, (source, copy) in enumerate(zip(pair, copies, strict=True)):
        model = mindir.read(source)
        if only in (None, i):
            change(model)
        copy.write_bytes(model.SerializeToString())
    return copies


@pytest.mark.parametrize("lengths", ["vector", "row", "column"])
@pytest.mark.parametrize("rows", [4, -1], ids=["static", "dynamic"])
@pytest.mark.parametrize(("generation", "tables"), [("paged", False), ("paged alike", True)])
def test_paged_pairs_are_known_in_any_form(generation: str, tables: bool, rows: int, lengths: str) -> None:
    shape = {"vector": (rows,), "row": (1, rows), "column": (rows, 1)}[lengths]
    prefill = paged(rows, 16 if rows > 0 else -1, 8, shape, tables=tables)
    found, ours, theirs = classify(prefill, paged(rows, 1, 8, shape, tables=True))
    assert found == generation
    assert [role.name for role in theirs] == ["token_ids", "valid_lengths", "block_tables", "slot_mapping"]
    assert len(ours) == len(prefill)


def test_every_kind_is_known_by_other_names_too() -> None:
    for generation, ours, choices in CONTRACTS:
        for theirs in choices:
            graphs = [
                [
                    GraphTensor(name=f"p{i}", dtype=role.dtypes[-1], shape=(-1,) * role.ranks[0])
                    for i, role in enumerate(roles)
                ]
                for roles in (ours, theirs)
            ]
            assert classify(*graphs)[0] == generation


def test_our_own_graphs_for_ascend_are_known() -> None:
    step, caches = [(-1,)] * 3 + [(-1, -1)] + [(-1,)] * 3, [(-1, 128, 2, 64)] * 6
    dtypes = ["int32"] * len(step) + ["bfloat16"] * len(caches)
    graph = [GraphTensor(*entry) for entry in zip(input_names(3), dtypes, step + caches, strict=True)]
    assert classify(graph, graph)[0] == "own"
    assert classify(graph[: len(step)], graph[: len(step)])[0] is None


@pytest.mark.parametrize(
    ("make", "generation", "letter"),
    [
        (foreign_graphs.static, "static", "A:"),
        (lambda folder: foreign_graphs.static(folder, lengths=(1, 2)), "static", "A:"),
        (lambda folder: foreign_graphs.static(folder, lengths=(2, 1)), "static", "A:"),
        (foreign_graphs.early, "early dynamic", "A':"),
        (lambda folder: foreign_graphs.early(folder, later=True), "early dynamic", "A':"),
        (lambda folder: foreign_graphs.continuous(folder, None), "continuous", "B:"),
        (lambda folder: foreign_graphs.continuous(folder, by_index=True), "continuous", "B:"),
    ],
    ids=["A", "A-row", "A-column", "A'", "A'-later", "B-dynamic", "B-by-index"],
)
@pytest.mark.slow
def test_unpaged_files_are_explained(
    make: Callable[[Path], Pair], generation: str, letter: str, tmp_path: Path
) -> None:
    found = read_contract(*make(tmp_path))
    assert found.generation == generation
    assert list(mismatches(found)) == []
    said = explain(found)
    assert f"generation {letter}" in said
    assert f"vocabulary of {foreign_graphs.VOCAB}" in said
    assert "not served" in said
    assert "python -m models.export" in said
    assert "\n" not in said


def test_a_continuous_pair_is_explained(pair: Pair) -> None:
    found = read_contract(*pair)
    assert found.generation == "continuous"
    assert [role.name for role in found.decode_roles] == ["token_ids", "valid_lengths", "cache_rows", "cache_length"]
    assert (found.prefill.vocab_size, len(found.prefill.caches)) == (foreign_graphs.VOCAB, 2)
    assert "generation B: continuous" in explain(found)
    assert "not served" in explain(found)


@pytest.mark.slow
def test_what_is_no_pair_is_shown(tmp_path: Path) -> None:
    said = explain(read_contract(*foreign_graphs.no_pair(tmp_path)))
    assert "no pair of a known kind" in said
    assert "The inputs of prefill are x float32 [2], y float32 [2]" in said


def test_graphs_of_different_models_do_not_belong_together(pair: Pair, tmp_path: Path) -> None:
    def rename(model: ModelProto) -> None:
        model.graph.parameter[0].name += "_of_another"

    def resize(model: ModelProto) -> None:
        cache = next(parameter for parameter in model.graph.parameter if parameter.name.endswith("key_past"))
        cache.dims[2] = 64

    def revocabulary(model: ModelProto) -> None:
        model.graph.output[0].attr_info.values[0].tensors[0].dims[1] = 33

    for change, problem in (
        (rename, "only prefill has the parameter"),
        (resize, "key_past is key_past float32 [4, 2, 16, 4] in prefill and key_past float32 [4, 2, 64, 4] in decode"),
        (revocabulary, "the vocabulary has 32 tokens in prefill and 33 in decode"),
    ):
        found = read_contract(*changed(pair, tmp_path, change, only=1))
        assert problem in " ".join(mismatches(found)), change
        assert "do not belong together" in explain(found)
    assert list(mismatches(read_contract(pair[0], pair[0]))) == ["prefill and decode are one file"]


def test_what_no_agent_can_run_is_named(pair: Pair, tmp_path: Path) -> None:
    def of_the_future(model: ModelProto) -> None:
        model.mind_ir_version = 99  # type: ignore[assignment]

    def with_operator(name: str) -> Callable[[ModelProto], Any]:
        return lambda model: model.graph.node.add(op_type=f"REF::{name}:7")

    def with_library(model: ModelProto) -> None:
        primitive = model.primitives.add(op_type="Custom")
        primitive.attribute.add(name="func_name", s=b"/tmp/evil.so:Run")

    everywhere = ["cpu", "ascend", "mindspore_lite"]
    for change, ways, problem in (
        (with_operator("ReshapeAndCache"), ["cpu"], "it uses ReshapeAndCache: fused operators of Ascend"),
        (with_operator("PromptKVCache"), everywhere, "it uses PromptKVCache, which MindSpore has no more"),
        (with_operator("AllReduce"), ["cpu", "ascend"], "one of several ranks (it uses AllReduce)"),
        (of_the_future, everywhere, "its mind_ir_version is 99, and the installed MindSpore reads up to"),
        (with_library, everywhere, "a foreign library, which is code: /tmp/evil.so:Run"),
    ):
        found = read_contract(*changed(pair, tmp_path, change))
        for way in get_args(Way):
            assert (problem in " ".join(obstacles(found, way))) == (way in ways), change
        assert (problem in explain(found)) == ("mindspore_lite" in ways)


@pytest.mark.slow
def test_the_command_says_it(pair: Pair) -> None:
    command = [sys.executable, "-m", "models.contract", *map(str, pair)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == explain(read_contract(*pair))


def test_programs_get_it_as_json(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert contract.main([*map(str, pair), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["generation"], said["served"]) == ("continuous", False)
    assert said["graphs"]["decode"]["inputs"][0]["role"] == "token_ids"
    assert said["explanation"] == explain(read_contract(*pair))


@pytest.mark.parametrize("content", [None, b"not a graph"], ids=["missing", "damaged"])
def test_a_file_that_is_none_is_named(
    pair: Pair, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decode.mindir"
    if content:
        path.write_bytes(content)
    assert contract.main([str(pair[0]), str(path)]) == 1
    assert re.search(rf"contract: {path}: (cannot be read: No such file|is not a MindIR file)", capsys.readouterr().err)


@pytest.mark.skipif(not MINDFORMERS, reason="MINDFORMERS_PAIR names no folder with a pair")
def test_a_pair_of_mindformers_is_explained() -> None:
    assert MINDFORMERS
    found = read_contract(Path(MINDFORMERS, "prefill.mindir"), Path(MINDFORMERS, "decode.mindir"))
    assert found.generation == "paged alike"
    assert list(mismatches(found)) == list(obstacles(found, "ascend")) == []
    assert "That runs on Ascend only: it uses " in explain(found)
    assert "ReshapeAndCache" in explain(found)
