"""One rank exported for Ascend, read back and held to what docs/ascend.md says of operators, inputs and outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
from mindspore.train.mind_ir_pb2 import ModelProto

from config.serving_config import WeightFormat
from models import mindir
from models.ascend_graphs import input_names, write_rank
from models.collectives import WORLD_GROUP, AllReduce, Share
from models.network_config import NetworkConfig
from models.sharding import Shard
from models.weight_map import WeightSource

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
