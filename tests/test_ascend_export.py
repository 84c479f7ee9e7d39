"""What is exported for Ascend, read back: operators and their order, inputs and outputs, groups, weights."""

from __future__ import annotations

import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from ascend_contract import Exported, assert_contract, assert_operators, export_rank, operators
from mindspore import nn
from tiny_checkpoints import write_tiny

from config.manifest import GraphTensor
from models import ascend, mindir
from models.checkpoint import CheckpointError, open_checkpoint
from models.contract import mismatches, read_contract
from models.export import ExportOptions, choose_weights, main

ROOT = Path(__file__).parent.parent


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(map(str, case)), marks=marks)
        for case, marks in [
            (("llama", 1, "float16"), ()),
            (("internlm", 1, "bfloat16"), ()),
            (("qwen2", 2, "bfloat16"), ()),
            (("qwen3", 1, "bfloat16"), ()),
            (("internlm2", 2, "float16"), ()),
            (("internlm", 2, "bfloat16"), pytest.mark.slow),
            (("qwen3", 2, "float16"), pytest.mark.slow),
        ]
    ],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family, ranks, weights = request.param
    folder = tmp_path_factory.mktemp("ascend")
    write_tiny(family, folder / "checkpoint")
    return export_rank(open_checkpoint(folder / "checkpoint"), folder / "rank", ranks - 1, ranks, weights)


def test_each_graph_has_the_operators_of_its_phase_in_their_order(exported: Exported) -> None:
    for phase in ascend.PHASES:
        assert_operators(exported, phase)


def test_inputs_and_outputs_are_the_contract(exported: Exported) -> None:
    for phase in ascend.PHASES:
        assert_contract(exported, phase)


def test_the_contract_reader_knows_them_as_ours(exported: Exported) -> None:
    pair = read_contract(exported.folder / "prefill.mindir", exported.folder / "decode.mindir")
    assert pair.generation == "own"
    assert list(mismatches(pair)) == []


def test_blocks_are_copied_by_reading_and_writing_them(exported: Exported) -> None:
    config = exported.source.config
    caches = tuple(tensor for tensor in mindir.inputs(exported.graph("decode")) if "_cache_" in tensor.name)
    read, write = exported.graph("read_blocks"), exported.graph("write_blocks")
    assert operators(read) == ["Gather", "Reshape"] * len(caches)
    assert mindir.inputs(read) == (GraphTensor(name="blocks", dtype="int32", shape=(-1,)), *caches)
    assert operators(write) == ["ReshapeAndCache"] * config.num_layers
    slots, *rest = mindir.inputs(write)
    assert (slots.name, slots.dtype, slots.shape) == ("slots", "int32", (-1,))
    assert tuple(rest[len(caches) :]) == caches
    width = config.num_kv_heads * config.head_dim
    assert [(tensor.dtype, tensor.shape) for tensor in rest[: len(caches)]] == [(exported.weights, (-1, width))] * len(
        caches
    )


def test_every_weight_of_the_file_is_the_checkpoints(exported: Exported) -> None:
    dtype = ascend.DTYPES[exported.weights]
    for phase in ascend.PHASES:
        graph = nn.GraphCell(ms.load(str(exported.folder / f"{phase}.mindir")))
        loaded = list(graph.parameters_dict().values())
        for name, shape in exported.source.config.weight_shapes().items():
            expected = exported.source.read(name).astype(dtype)
            same = [p for p in loaded if p.shape == shape and np.array_equal(p.asnumpy(), expected)]
            assert same, f"{phase}: no parameter holds {name}"


def test_there_is_nothing_that_the_documents_table_does_not_list(exported: Exported) -> None:
    listed = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8"), re.MULTILINE))
    for phase in ascend.PHASES:
        assert set(operators(exported.graph(phase))) <= listed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--operators", "native"], "--operators: those of --target ascend are the NPU's own"),
        (["--block-size", "8"], "--block-size: Ascend's attention takes multiples of 16"),
    ],
)
def test_what_an_npu_does_not_take_is_refused_by_the_command(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["nothing.gguf", "--target", "ascend", *arguments])
    assert problem in capsys.readouterr().err


def test_weights_are_of_a_dtype_that_the_target_takes(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for operators_, wish, problem in (
        ("ascend", "int8", "--weights int8: Ascend's operators take bfloat16 or float16"),
        ("native", "float16", "--weights float16: the CPU's operators do not read it; --target ascend has it"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            choose_weights(ExportOptions(operators=operators_, weights=wish), checkpoint, "")
    assert choose_weights(ExportOptions(operators="ascend", weights="auto"), checkpoint, "") == "bfloat16"
