"""The operators that matter for speed, in C++ inside the MindIR (``kernels/``): the other side of ``models.portable``.

Here the *graph* writes the cache: one operator applies rotary embedding, writes new keys and values through the slot
mapping and attends over the row's blocks, for rows of any length in either phase.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from config.serving_config import WeightFormat
from kernels import library
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.weight_format import MATRICES, block_kind, panels, read_blocks, row_bytes
from models.weight_map import Rows, Weights, WeightSource, of_layer

F32, I32, U8 = DataType.F32_Default, DataType.I32_Default, DataType.U8_Default

MAX_STEP_TOKENS = None  # as many as the configuration allows
MAX_HEAD_DIM, MAX_GROUP = 256, 64  # of paged_attention.cc
CACHE_DTYPES = (F32, DataType.F16_Default, DataType.BF16_Default, DataType.I8_Default)
STEP_DTYPES = [(F32, F32, I32, I32, I32, I32, cache, cache) for cache in CACHE_DTYPES]  # x, geometry and cache
LAYERS_AT_ONCE = 10  # in one operator; what more of them would save is lost in the noise


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


def layout(source: WeightSource, name: str, weights: WeightFormat) -> tuple[Any, tuple[int, ...]]:
    """MindSpore's dtype and the shape of what ``read`` returns for a matrix.

    Raises:
        CheckpointError: the weight cannot have that format.
    """
    rows, columns = source.config.weight_shapes()[name]
    if weights == "float32":
        return ms.float32, (rows, columns)
    return ms.uint8, (rows, row_bytes(block_kind(source, name, weights), columns))


def read(source: WeightSource, name: str, weights: WeightFormat) -> Rows:
    """A weight of ``network_config`` as these operators want it.

    Norms end in their epsilon; rows of gate and up take turns, so that a thread has both of an output; matrices have
    the format ``weights``.

    Raises:
        CheckpointError: the weight cannot have that format.
    """
    config, kind = source.config, name.rpartition(".")[2]
    if kind in ("attention_norm", "mlp_norm", "norm"):
        return np.append(source.read(name), np.float32(config.norm_eps))
    if weights == "float32" or kind not in MATRICES:
        value = source.read(name)
        return in_turn(value) if kind == "gate_up" else value
    blocks = read_blocks(source, name, weights)
    if kind == "gate_up":
        blocks = replace(blocks, rows=in_turn(blocks.rows))
    return panels(blocks, config.weight_shapes()[name][1])


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
    """Some layers one after another in one operator: attention and gated MLP, each on the residual stream.

    ``construct(x [T, hidden], geometry, key_cache, value_cache) -> (x, ())``: nothing is left for the host to write.
    """

    def __init__(self, config: NetworkConfig, layers: range, weights: Weights) -> None:
        super().__init__(auto_prefix=False)
        of_all = [(index, of_layer(weights, index)) for index in layers]
        own = [(*attention_inputs(config, i, its), *mlp_inputs(its), *biases_of(its)) for i, its in of_all]
        self.own = ParameterTuple(weight for layer in own for weight in layer)
        count = Tensor(np.array([len(layers)], np.int32))
        self.count = Parameter(count, name=f"layers.{layers.start}.count", requires_grad=False)
        self.run = custom("DecoderLayers", *((*step, I32, *map(dtype_of, self.own), F32) for step in STEP_DTYPES))

    def construct(self, x: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        return self.run(x, *geometry, key_cache, value_cache, self.count, *self.own), ()


class SharedLayer(nn.Cell):  # type: ignore[misc]
    """One layer on one of several ranks, whose results ``reduce`` sums up after attention and after the MLP."""

    def __init__(self, config: NetworkConfig, index: int, weights: Weights, reduce: Any) -> None:
        super().__init__(auto_prefix=False)
        self.attention = ParameterTuple((*attention_inputs(config, index, weights), *biases_of(weights)))
        self.mlp = ParameterTuple(mlp_inputs(weights))
        self.attend = custom("AttentionShare", *((*step, *map(dtype_of, self.attention), F32) for step in STEP_DTYPES))
        self.gate = custom("MLPShare", (F32, *map(dtype_of, self.mlp), F32))
        self.reduce = reduce

    def construct(self, x: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        x = x + self.reduce(self.attend(x, *geometry, key_cache, value_cache, *self.attention))
        return x + self.reduce(self.gate(x, *self.mlp)), ()


def layers(phase: str, config: NetworkConfig, weights: Weights, reduce: Any = None) -> list[nn.Cell]:
    """A network's layers, the same in both phases: several in a Cell, or one if ``reduce`` sums up several ranks'."""
    every = range(config.num_layers)
    if reduce is not None:
        return [SharedLayer(config, index, of_layer(weights, index), reduce) for index in every]
    return [DecoderLayers(config, every[i : i + LAYERS_AT_ONCE], weights) for i in every[::LAYERS_AT_ONCE]]


def attention_inputs(config: NetworkConfig, index: int, weights: Weights) -> tuple[Parameter, ...]:
    """A layer's norm, qkv, constants and output.

    Raises:
        CheckpointError: the C++ attention does not take such heads.
    """
    check_heads(config)
    constants = attention_constants(config, index, weights("q_norm"), weights("k_norm"))
    return weights("attention_norm"), weights("qkv"), constants, weights("output")


def mlp_inputs(weights: Weights) -> tuple[Parameter, ...]:
    """A layer's other norm, gate with up, and down."""
    return weights("mlp_norm"), weights("gate_up"), weights("down")


def biases_of(weights: Weights) -> tuple[Parameter, ...]:
    """The biases that a layer has: of qkv, or of qkv and output."""
    return tuple(bias for bias in (weights("qkv_bias"), weights("output_bias")) if bias is not None)


class Head(nn.Cell):  # type: ignore[misc]
    """RMS norm and vocabulary at the wanted positions: logits ``[L, V]`` and the largest of each 64 of them."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight = norm, weight
        self.head = custom("Head", (F32, I32, F32, dtype_of(weight), F32, F32), outputs=2)

    def construct(self, x: Tensor, logits_indices: Tensor) -> Any:
        return self.head(x, logits_indices, self.norm, self.weight)


def attention_constants(config: NetworkConfig, layer: int, q_norm: Parameter | None, k_norm: Parameter | None) -> Any:
    """What PagedAttention must know of the network: numbers, then the weights of the heads' norms if it has them."""
    numbers = [layer, config.num_layers, config.num_heads, config.num_kv_heads, config.norm_eps]
    norms = [] if q_norm is None or k_norm is None else [q_norm.asnumpy(), k_norm.asnumpy()]
    packed = np.concatenate([np.asarray(numbers, dtype=np.float32), *norms])
    return Parameter(Tensor(packed), name=f"layers.{layer}.attention_constants", requires_grad=False)


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
