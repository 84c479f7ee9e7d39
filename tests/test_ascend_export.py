"""What is exported for Ascend, read back: operators and their order, inputs and outputs, groups, weights."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.train.mind_ir_pb2 import ModelProto
from tiny_checkpoints import write_tiny

from config.serving_config import WeightFormat
from models import ascend, mindir
from models.ascend_graphs import input_names, write_rank
from models.checkpoint import open_checkpoint
from models.collectives import WORLD_GROUP, AllReduce, Share
from models.network_config import NetworkConfig
from models.sharding import Shard
from models.weight_map import WeightSource

ROOT = Path(__file__).parent.parent
STRUCTURE = {"Constant", "Load", "UpdateState", "Depend", "MakeTuple", "TupleGetItem"}  # no operators
ATTENTION = {"prefill": "FlashAttentionScore", "chunk": "PagedAttention", "decode": "PagedAttention"}
LENGTHS = ["Cast", "TensorToTuple"]  # FlashAttentionScore's lengths, for each of its two lists
MASK = ["ExpandDims", "Greater", "Cast", "Muls"]
OWN_TOKENS = ["Sub", "GreaterEqual", "LessScalar", "LogicalAnd", "Cast", "Cast", "Mul", "Mul", "ExpandDims"]


@dataclass(frozen=True)
class Exported:
    """One rank's graphs in a folder."""

    folder: Path
    source: WeightSource
    ranks: int
    weights: WeightFormat

    def graph(self, phase: str) -> ModelProto:
        return mindir.read(self.folder / f"{phase}.mindir")


def export_rank(whole: WeightSource, folder: Path, rank: int, ranks: int, weights: WeightFormat) -> Exported:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    shard = Shard(whole, rank, ranks) if ranks > 1 else None
    share = Share(shard.first_token, AllReduce(WORLD_GROUP["ascend"])) if shard else None
    folder.mkdir()
    write_rank(shard or whole, folder, weights, 128, share)
    return Exported(folder, shard or whole, ranks, weights)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(map(str, case)), marks=marks)
        for case, marks in [
            (("llama", 1, "float16"), ()),
            (("internlm", 1, "bfloat16"), ()),
            (("qwen2", 2, "bfloat16"), ()),
            (("qwen3", 1, "bfloat16"), ()),
            (("internlm2", 2, "float16"), pytest.mark.slow),
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


def assert_operators(exported: Exported, phase: str) -> None:
    config, ranks = exported.source.config, exported.ranks
    expected_layers = layer_operators(config, phase, ranks) * config.num_layers
    of_step = Counter(["Gather"] * 4 + ["Cast"])  # embedding, cos, sin, wanted positions; logits
    of_step.update({"prefill": LENGTHS * 2, "chunk": MASK, "decode": []}[phase])
    of_step.update(OWN_TOKENS if ranks > 1 else [])
    found = operators(exported.graph(phase))
    assert Counter(name for name in found if name in of_step) == of_step
    rest = [name for name in found if name not in of_step]
    assert rest == ["AllReduce"] * (ranks > 1) + expected_layers + ["RmsNorm", "MatMul"]
    groups = {group for op, group in collectives(exported.graph(phase))}
    assert groups == ({"hccl_world_group"} if ranks > 1 else set())


def layer_operators(config: NetworkConfig, phase: str, ranks: int) -> list[str]:
    """Those of one decoder layer, in their order."""
    reduce = ["AllReduce"] * (ranks > 1)
    by_head = [name for heads in (config.num_heads, config.num_kv_heads) for name in norm_of_heads(heads)]
    return [
        "RmsNorm", "MatMul", *["Add"] * config.qkv_bias, "SplitWithSize", *by_head * config.qk_norm,
        "ApplyRotaryPosEmb", "ReshapeAndCache", ATTENTION[phase],
        "MatMul", *["Add"] * config.output_bias, *reduce, "Add",
        "RmsNorm", "MatMul", "Swiglu", "MatMul", *reduce, "Add",
    ]  # fmt: skip


def norm_of_heads(heads: int) -> list[str]:
    """Of queries or keys; MindSpore drops the reshape of a single head."""
    reshape = ["Reshape"] * (heads > 1)
    return [*reshape, "RmsNorm", *reshape]


def assert_contract(exported: Exported, phase: str) -> None:
    config, model = exported.source.config, exported.graph(phase)
    inputs = mindir.inputs(model)
    assert tuple(tensor.name for tensor in inputs) == input_names(config.num_layers)
    assert [tensor.shape for tensor in inputs[:7]] == [(-1,), (-1,), (-1,), (-1, -1), (-1,), (-1,), (-1,)]
    assert {tensor.dtype for tensor in inputs[:7]} == {"int32"}
    cache = (-1, 128, config.num_kv_heads, config.head_dim)
    assert {(tensor.dtype, tensor.shape) for tensor in inputs[7:]} == {(exported.weights, cache)}
    (output,) = model.graph.output
    assert output.tensor[0].data_type == output.tensor[0].FLOAT
    assert list(output.tensor[0].dims) == [-1, config.vocab_size]


def operators(model: ModelProto) -> list[str]:
    """The names of a graph's operators, in the order in which they stand."""
    assert not model.functions, "a graph that calls others"
    kinds = {primitive.name: primitive.op_type for primitive in model.primitives}
    names = [kinds.get(node.op_type.removeprefix("REF::"), node.op_type) for node in model.graph.node]
    return [name for name in names if name not in STRUCTURE]


def collectives(model: ModelProto) -> list[tuple[str, str]]:
    """The kinds of operators that belong to a group of processes, and their groups."""
    return [
        (primitive.op_type, attribute.s.decode())
        for primitive in model.primitives
        for attribute in primitive.attribute
        if attribute.name == "group"
    ]
