"""The operators that matter for speed, in C++ inside the MindIR (``kernels/``): the other side of ``models.portable``.

Here the *graph* writes the cache: one operator applies rotary embedding, writes new keys and values through the slot
mapping and attends over the row's blocks, for rows of any length in either phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from config.serving_config import WeightFormat
from kernels import library
from models import bundle
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.weight_format import MATRICES, block_kind, panels, read_blocks, row_bytes
from models.weight_map import Floats, Rows, Weights, WeightSource

F32, I32, U8 = DataType.F32_Default, DataType.I32_Default, DataType.U8_Default

MAX_STEP_TOKENS = None  # as many as the configuration allows
MAX_HEAD_DIM, MAX_GROUP = 256, 64  # of paged_attention.cc
CACHE_DTYPES = (F32, DataType.F16_Default, DataType.BF16_Default, DataType.I8_Default)
STEP_DTYPES = [(F32, F32, I32, I32, I32, I32, cache, cache) for cache in CACHE_DTYPES]  # x, geometry and cache
HEAD_NORMS = ("q_norm", "k_norm")
NORMS = ("attention_norm", "mlp_norm", "norm")
CONSTANTS, CONSTANT_NUMBERS = "constants", 5  # of attention
LAYER = ("attention_norm", "qkv", CONSTANTS, "output", "mlp_norm", "gate_up", "down", "qkv_bias", "output_bias")


def custom(name: str, *signatures: tuple[Any, ...], outputs: int = 1) -> ops.Custom:
    """An operator of our library. Each signature names the dtypes of its inputs, then of its outputs.

    Shapes and types are inferred in C++, which dynamic shapes and a reloaded MindIR both need.
    """
    info = CustomRegOp(name)
    for i in range(len(signatures[0]) - outputs):
        info = info.input(i, f"x{i}")
    for i in range(outputs):
        info = info.output(i, f"y{i}")
    for signature in signatures:
        info = info.dtype_format(*signature)
    return ops.Custom(f"{library.path()}:{name}", None, None, "aot", reg_info=info.target("CPU").get_op_info())


def names(config: NetworkConfig) -> set[str]:
    """What the Cells below ask for: weights, and of each layer its ``parts`` in one."""
    return {*config.weight_shapes(), *(f"layers.{index}" for index in range(config.num_layers))}


def parts(config: NetworkConfig, layer: str) -> list[str]:
    """What is in a layer's bundle, in the order of ``LayerWeight`` in ``kernels/layer.cc``."""
    weights = config.weight_shapes()
    return [name for kind in LAYER if (name := f"{layer}.{kind}") in weights or kind == CONSTANTS]


def is_layer(name: str) -> bool:
    """Whether this is all of a layer, rather than a weight."""
    return name.startswith("layers.") and name.count(".") == 1


def layout(source: WeightSource, name: str, weights: WeightFormat) -> tuple[Any, tuple[int, ...]]:
    """MindSpore's dtype and the shape of what ``read`` returns for a name, without reading it.

    Raises:
        CheckpointError: the weight cannot have that format.
    """
    if is_layer(name):
        return ms.uint8, (bundle.size([array_layout(source, part, weights) for part in parts(source.config, name)]),)
    dtype, shape = array_layout(source, name, weights)
    return (ms.uint8 if dtype == np.uint8 else ms.float32), shape


def array_layout(source: WeightSource, name: str, weights: WeightFormat) -> bundle.Layout:
    """NumPy's dtype and the shape of one weight or of a layer's constants."""
    config, kind = source.config, name.rpartition(".")[2]
    if kind == CONSTANTS:
        return np.float32, (CONSTANT_NUMBERS + (2 * config.head_dim if config.qk_norm else 0),)
    shape = config.weight_shapes()[name]
    if kind in MATRICES and weights != "float32":
        return np.uint8, (shape[0], row_bytes(block_kind(source, name, weights), shape[1]))
    return np.float32, (shape[0] + 1,) if kind in NORMS else shape


def read(source: WeightSource, name: str, weights: WeightFormat) -> Rows:
    """A weight of ``network_config`` as these operators want it, or a layer's in one.

    Norms end in their epsilon; rows of gate and up take turns, so that a thread has both of an output; matrices have
    the format ``weights``.

    Raises:
        CheckpointError: the weight cannot have that format.
    """
    config, kind = source.config, name.rpartition(".")[2]
    if is_layer(name):
        inside = parts(config, name)
        layouts = [array_layout(source, part, weights) for part in inside]
        return bundle.pack(layouts, (read(source, part, weights) for part in inside))
    if kind == CONSTANTS:
        return attention_constants(source, name.removesuffix(f".{CONSTANTS}"))
    if kind in NORMS:
        return np.append(source.read(name), np.float32(config.norm_eps))
    if weights == "float32" or kind not in MATRICES:
        value = source.read(name)
        return in_turn(value) if kind == "gate_up" else value
    blocks = read_blocks(source, name, weights)
    if kind == "gate_up":
        blocks = replace(blocks, rows=in_turn(blocks.rows))
    return panels(blocks, config.weight_shapes()[name][1])


def attention_constants(source: WeightSource, layer: str) -> Floats:
    """What PagedAttention must know of the network: numbers, then the weights of the heads' norms if it has them."""
    config = source.config
    index = int(layer.removeprefix("layers."))
    numbers = [index, config.num_layers, config.num_heads, config.num_kv_heads, config.norm_eps]
    norms = [source.read(f"{layer}.{norm}") for norm in HEAD_NORMS] if config.qk_norm else []
    constants: Floats = np.concatenate([np.asarray(numbers, dtype=np.float32), *norms])
    return constants


def in_turn(rows: Rows) -> Rows:
    """The rows of the two halves of a weight in turn: the first of each, the second of each, …"""
    first, second = np.split(rows, 2)
    turns: Rows = np.stack((first, second), axis=1).reshape(rows.shape)
    return turns


def dtype_of(weight: Parameter) -> Any:
    """Packed weights are bytes."""
    return U8 if weight.dtype == ms.uint8 else F32


class Embedding(nn.Cell):  # type: ignore[misc]
    """The rows of the tokens: i32 ``[T] → [T, hidden]``. A norm's length says how many numbers a packed row has."""

    def __init__(self, weight: Parameter, norm: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.norm = weight, norm
        self.rows = custom("Embedding", (I32, dtype_of(weight), F32, F32))

    def construct(self, token_ids: Tensor) -> Tensor:
        return self.rows(token_ids, self.weight, self.norm)


class SharedEmbedding(nn.Cell):  # type: ignore[misc]
    """The same where this rank has the rows from ``first_token`` on, and zeros for the tokens of the others."""

    def __init__(self, weight: Parameter, norm: Parameter, first_token: int) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.norm = weight, norm
        first = np.array([first_token], np.int32)
        self.first = Parameter(Tensor(first), name="first_token", requires_grad=False)
        self.rows = custom("Embedding", (I32, dtype_of(weight), F32, I32, F32))

    def construct(self, token_ids: Tensor) -> Tensor:
        return self.rows(token_ids, self.weight, self.norm, self.first)


class Geometry(nn.Cell):  # type: ignore[misc]
    """What attention knows of a step: ``(cos_sin [T, D], slot_mapping, block_tables, query_lens, context_lens)``."""

    def __init__(self, frequencies: Parameter, block_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.frequencies = frequencies
        self.angles = custom("RotaryAngles", (I32, F32, F32))

    def construct(
        self, positions: Tensor, slot_mapping: Tensor, block_tables: Tensor, query_lens: Tensor, context_lens: Tensor
    ) -> Any:
        return self.angles(positions, self.frequencies), slot_mapping, block_tables, query_lens, context_lens


class DecoderLayers(nn.Cell):  # type: ignore[misc]
    """Layers one after another in one operator: attention and gated MLP, each on the residual stream.

    ``construct(x [T, hidden], geometry, key_cache, value_cache) -> (x, ())``: nothing is left for the host to write.
    """

    def __init__(self, layers: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.own = ParameterTuple(layers)
        self.run = custom("DecoderLayers", *((*step, *(U8 for _ in layers), F32) for step in STEP_DTYPES))

    def construct(self, x: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        return self.run(x, *geometry, key_cache, value_cache, *self.own), ()


class SharedLayer(nn.Cell):  # type: ignore[misc]
    """One layer on one of several ranks, whose results ``reduce`` sums up after attention and after the MLP."""

    def __init__(self, layer: Parameter, reduce: Any) -> None:
        super().__init__(auto_prefix=False)
        self.own = layer
        self.attend = custom("AttentionShare", *((*step, U8, F32) for step in STEP_DTYPES))
        self.gate = custom("MLPShare", (F32, U8, F32))
        self.reduce = reduce

    def construct(self, x: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        x = x + self.reduce(self.attend(x, *geometry, key_cache, value_cache, self.own))
        return x + self.reduce(self.gate(x, self.own)), ()


def layers(phase: str, config: NetworkConfig, weights: Weights, reduce: Any = None) -> list[nn.Cell]:
    """A network's layers, the same in both phases: all in one Cell, or a Cell each if ``reduce`` sums up ranks' shares.

    Raises:
        CheckpointError: the C++ attention does not take such heads.
    """
    check_heads(config)
    every = [weights(f"layers.{index}") for index in range(config.num_layers)]
    if reduce is not None:
        return [SharedLayer(layer, reduce) for layer in every]
    return [DecoderLayers(every)]


class Head(nn.Cell):  # type: ignore[misc]
    """RMS norm and vocabulary at the wanted positions: logits ``[L, V]`` and the largest of each 64 of them."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight = norm, weight
        self.head = custom("Head", (F32, I32, F32, dtype_of(weight), F32, F32), outputs=2)

    def construct(self, x: Tensor, logits_indices: Tensor) -> Any:
        return self.head(x, logits_indices, self.norm, self.weight)


def check_heads(config: NetworkConfig) -> None:
    """See that the C++ attention takes these heads.

    Raises:
        CheckpointError: it does not.
    """
    if config.head_dim % 2 or config.head_dim > MAX_HEAD_DIM or config.num_heads > MAX_GROUP * config.num_kv_heads:
        raise CheckpointError(
            f"heads of {config.head_dim} numbers, {config.num_heads} of them on {config.num_kv_heads}: the C++ "
            f"attention takes an even number up to {MAX_HEAD_DIM}, and {MAX_GROUP} on one; export with "
            "--operators portable"
        )


GEOMETRY = {"prefill": Geometry, "decode": Geometry}
