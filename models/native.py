"""The operators that matter for speed, in C++ inside the MindIR (``kernels/``): the other side of ``models.portable``.

Here the *graph* writes the cache: one operator applies rotary embedding, writes new keys and values through the slot
mapping and attends over the row's blocks, for rows of any length in either phase.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from config.serving_config import WeightFormat
from kernels import library
from models.checkpoint import Checkpoint
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.portable import Rope
from models.weight_format import MATRICES, panels, read_blocks
from models.weight_map import Rows

F16, F32, I32, U8 = DataType.F16_Default, DataType.F32_Default, DataType.I32_Default, DataType.U8_Default

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "gguf")
MAX_STEP_TOKENS = None  # as many as the configuration allows
MAX_HEAD_DIM, MAX_GROUP = 256, 64  # of paged_attention.cc


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


def read(checkpoint: Checkpoint, name: str, weights: WeightFormat) -> Rows:
    """A weight of ``network_config`` as these operators want it.

    Norms end in their epsilon; rows of gate and up take turns, so that a thread has both of an output; matrices have
    the format ``weights``.

    Raises:
        CheckpointError: the weight cannot have that format.
    """
    config, kind = checkpoint.config, name.rpartition(".")[2]
    if kind in ("attention_norm", "mlp_norm", "norm"):
        return np.append(checkpoint.read(name), np.float32(config.norm_eps))
    if weights == "float32" or kind not in MATRICES:
        value = checkpoint.read(name)
        return in_turn(value) if kind == "gate_up" else value
    blocks = read_blocks(checkpoint, name, weights)
    if kind == "gate_up":
        blocks = replace(blocks, rows=in_turn(blocks.rows))
    return panels(blocks, config.weight_shapes()[name][1])


def in_turn(rows: Rows) -> Rows:
    """The rows of the two halves of a weight in turn: the first of each, the second of each, …"""
    first, second = np.split(rows, 2)
    turns: Rows = np.stack((first, second), axis=1).reshape(rows.shape)
    return turns


def linear(name: str, weight: Parameter, *, before: int, bias: Parameter | None = None) -> ops.Custom:
    """A linear operator with ``before`` float32 inputs in front of its weight, which is of any format."""
    signature = (F32,) * before + (U8 if weight.dtype == ms.uint8 else F32,) + (F32,) * (bias is not None)
    return custom(name, (*signature, F32))


class Embedding(nn.Cell):  # type: ignore[misc]
    """The rows of the tokens: i32 ``[T] → [T, hidden]``. A norm's length says how many numbers a packed row has."""

    def __init__(self, weight: Parameter, norm: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.norm = weight, norm
        self.rows = custom("Embedding", (I32, U8 if weight.dtype == ms.uint8 else F32, F32, F32))

    def construct(self, token_ids: Tensor) -> Tensor:
        return self.rows(token_ids, self.weight, self.norm)


class Head(nn.Cell):  # type: ignore[misc]
    """RMS norm and the vocabulary: ``[L, hidden] →`` logits ``[L, V]`` and the largest of each 64 of them."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight = norm, weight
        signature = (F32, F32, U8 if weight.dtype == ms.uint8 else F32, F32, F32)
        self.head = custom("Head", signature, outputs=2)

    def construct(self, x: Tensor) -> Any:
        return self.head(x, self.norm, self.weight)


class NormLinear(nn.Cell):  # type: ignore[misc]
    """RMS norm, then a linear layer: ``[T, in] → [T, out]``."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter, bias: Parameter | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight, self.bias = norm, weight, bias
        self.linear = linear("NormLinear", weight, before=2, bias=bias)

    def construct(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.linear(x, self.norm, self.weight)
        return self.linear(x, self.norm, self.weight, self.bias)


class NormGatedLinear(nn.Cell):  # type: ignore[misc]
    """RMS norm, gate and up projection, ``silu(gate) * up``: ``[T, in] → [T, I]``."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight = norm, weight
        self.linear = linear("NormGatedLinear", weight, before=2)

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(x, self.norm, self.weight)


class ResidualLinear(nn.Cell):  # type: ignore[misc]
    """A linear layer whose result is added to the residual stream."""

    def __init__(self, weight: Parameter, bias: Parameter | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.bias = weight, bias
        self.linear = linear("ResidualLinear", weight, before=2, bias=bias)

    def construct(self, residual: Tensor, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.linear(residual, x, self.weight)
        return self.linear(residual, x, self.weight, self.bias)


class Geometry(nn.Cell):  # type: ignore[misc]
    """What attention knows of a step: ``(cos_sin [T, D], slot_mapping, block_tables, query_lens, context_lens)``."""

    def __init__(self, frequencies: Parameter, block_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.rope = Rope(frequencies)

    def construct(
        self, positions: Tensor, slot_mapping: Tensor, block_tables: Tensor, query_lens: Tensor, context_lens: Tensor
    ) -> Any:
        cos, sin = self.rope(positions)
        return ops.concat((cos, sin), 2).squeeze(1), slot_mapping, block_tables, query_lens, context_lens


class Attention(nn.Cell):  # type: ignore[misc]
    """One layer's rotary embedding, cache write and attention.

    ``construct(qkv, geometry, key_cache, value_cache) -> (out [T, H * D], ())``: nothing is left for the host to write.
    """

    def __init__(self, config: NetworkConfig, layer: int, q_norm: Parameter | None, k_norm: Parameter | None) -> None:
        super().__init__(auto_prefix=False)
        if config.head_dim > MAX_HEAD_DIM or config.num_heads > MAX_GROUP * config.num_kv_heads:
            raise CheckpointError(
                f"heads of {config.head_dim} numbers, {config.num_heads} of them on {config.num_kv_heads}: the C++ "
                f"attention takes {MAX_HEAD_DIM} and {MAX_GROUP} on one; export with --operators portable"
            )
        constants = [layer, config.num_layers, config.num_heads, config.num_kv_heads, config.norm_eps]
        norms = [] if q_norm is None or k_norm is None else [q_norm.asnumpy(), k_norm.asnumpy()]
        packed = np.concatenate([np.asarray(constants, dtype=np.float32), *norms])
        self.constants = Parameter(Tensor(packed), name=f"layers.{layer}.attention_constants", requires_grad=False)
        heads = (F32, F32, I32, I32, I32, I32)
        self.attend = custom("PagedAttention", (*heads, F32, F32, F32, F32), (*heads, F16, F16, F32, F32))

    def construct(self, qkv: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        cos_sin, slots, tables, query_lens, context_lens = geometry
        out = self.attend(qkv, cos_sin, slots, tables, query_lens, context_lens, key_cache, value_cache, self.constants)
        return out, ()


GEOMETRY = {"prefill": Geometry, "decode": Geometry}
ATTENTION = {"prefill": Attention, "decode": Attention}
