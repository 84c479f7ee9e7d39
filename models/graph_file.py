"""One foreign MindIR file, read as data: what it takes, what it holds, what it is made of. Nothing of it is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mindspore.train.mind_ir_pb2 import GraphProto, ModelProto, Version

from config.manifest import GraphTensor
from models import mindir

KNOWN_VERSION = max(Version.values())  # the mind_ir_version that the installed MindSpore writes
CACHE_RANK = 4  # of a cache: blocks, tokens of a block, heads, numbers of a head; or sequences, heads, tokens, numbers
HEAD_NAMES = ("lm_head.weight", "lm_head", "head.weight")  # that end the name of a vocabulary's weight, [vocab, hidden]

# Fused operators of Ascend: MindSpore exports them anywhere, and has no CPU kernel for them: some of them
# were tried on a CPU, the others are documented for Ascend only.
_TRIED = """PagedAttention PagedAttentionMask ReshapeAndCache FlashAttentionScore PromptFlashAttention
IncreFlashAttention RmsNorm AddRmsNorm ApplyRotaryPosEmb Swiglu QuantBatchMatmul WeightQuantBatchMatmul GroupedMatmulV4
TopkExt SortExt CumsumExt MultinomialExt"""
_DOCUMENTED = """FusedInferAttentionScore GroupedMatmul KVCacheScatterUpdate MoeInitRouting GroupTopk QuantV2
DynamicQuantExt MatmulAllReduceAddRmsNorm AllGatherMatmul MatmulReduceScatter Mla KvScaleCache"""
ASCEND_OPERATORS = frozenset((_TRIED + " " + _DOCUMENTED).split())
GONE_OPERATORS = frozenset({"PromptKVCache", "DecoderKVCache"})  # in no MindSpore since 2.10, on any device
_COLLECTIVES = """AllReduce AllGather ReduceScatter Broadcast AllToAll AllGatherMatmul MatmulReduceScatter
MatmulAllReduceAddRmsNorm"""
COLLECTIVES = frozenset(_COLLECTIVES.split())


@dataclass(frozen=True)
class GraphFile:
    """One graph of a pair."""

    path: Path
    model: ModelProto

    @classmethod
    def read(cls, path: Path) -> GraphFile:
        """Parse one file.

        Raises:
            mindir.MindIRError: it is missing, or no MindIR; the message names it.
        """
        try:
            return cls(path, mindir.read(path))
        except OSError as error:
            raise mindir.MindIRError(f"{path}: cannot be read: {error.strerror}") from None

    @cached_property
    def version(self) -> int:
        """Its ``mind_ir_version``."""
        return int(self.model.mind_ir_version)

    @cached_property
    def producer(self) -> str:
        """What wrote it: ``MindSpore 2.10.0``; files of early releases do not say a version."""
        producer = self.model.producer_name or "an unknown program"
        return f"{producer} {self.model.model_version}".strip()

    @cached_property
    def inputs(self) -> tuple[GraphTensor, ...]:
        """In feed order, named as their author named them."""
        return mindir.inputs(self.model)

    @cached_property
    def logits(self) -> tuple[int, ...]:
        """The shape of the first output, which is the logits; empty if the file does not say."""
        for output in self.model.graph.output:
            if output.tensor:
                return tuple(output.tensor[0].dims)
            for value in output.attr_info.values:  # a tuple's
                return tuple(value.tensors[0].dims) if value.tensors else ()
        return ()

    @cached_property
    def vocab_size(self) -> int | None:
        """Of the logits, or of the weight that makes them; None if neither says."""
        if self.logits and self.logits[-1] > 0:
            return self.logits[-1]
        heads = [tensor for name, tensor in self.parameters.items() if name.endswith(HEAD_NAMES)]
        return heads[0].shape[0] if len(heads) == 1 else None

    @cached_property
    def parameters(self) -> dict[str, GraphTensor]:
        """Weights and caches by name."""
        tensors = (mindir.tensor(parameter.name, parameter) for parameter in self.model.graph.parameter)
        return {tensor.name: tensor for tensor in tensors}

    @cached_property
    def caches(self) -> dict[str, GraphTensor]:
        """The parameters that have a cache's rank: keys and values of each layer."""
        return {name: tensor for name, tensor in self.parameters.items() if len(tensor.shape) == CACHE_RANK}

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The files beside it that hold its weights, as it names them."""
        named = (parameter.external_data.location for parameter in self.model.graph.parameter)
        return tuple(sorted({name for name in named if name}))

    @cached_property
    def operators(self) -> frozenset[str]:
        """The names of all operators, in the graph and in those that it calls."""
        graphs: list[GraphProto] = [self.model.graph, *self.model.functions]
        called = {node.op_type for graph in graphs for node in graph.node}
        plain = {re.sub(r"^REF::(.*):\d+$", r"\1", name).rpartition("::")[2] for name in called}
        return frozenset(plain | {primitive.op_type for primitive in self.model.primitives})

    @cached_property
    def libraries(self) -> tuple[str, ...]:
        """``library:function`` of every operator that is a piece of foreign machine code."""
        named = mindir.custom_operators(self.model)
        return tuple(sorted(named or self.operators & {"Custom"}))

    def numbers(self, name: str) -> bytes:
        """The bytes of one parameter, from the file or from where it names them."""
        stored = self.model.graph.parameter
        parameter = next(each for each in stored if mindir.plain_name(each.name) == name)
        data: bytes = parameter.raw_data
        return data or mindir.read_external(parameter, self.path.parent)
