"""The operators that matter for speed, in C++ inside the MindIR (``kernels/``): the other side of ``models.portable``.

Here the *graph* writes the cache: one operator applies rotary embedding, writes new keys and values through the slot
mapping and attends over the row's blocks, for rows of any length in either phase.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import CustomRegOp, DataType

from kernels import library
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.portable import Rope
from models.weight_map import Floats

F16, F32, I32 = DataType.F16_Default, DataType.F32_Default, DataType.I32_Default

MAX_STEP_TOKENS = None  # as many as the configuration allows
MAX_HEAD_DIM, MAX_GROUP = 256, 64  # of paged_attention.cc


def custom(name: str, *signatures: tuple[Any, ...]) -> ops.Custom:
    """An operator of our library. Each signature names the dtypes of its inputs, then of its output.

    Shapes and types are inferred in C++, which dynamic shapes and a reloaded MindIR both need.
    """
    info = CustomRegOp(name)
    for i in range(len(signatures[0]) - 1):
        info = info.input(i, f"x{i}")
    info = info.output(0, "y")
    for signature in signatures:
        info = info.dtype_format(*signature)
    return ops.Custom(f"{library.path()}:{name}", None, None, "aot", reg_info=info.target("CPU").get_op_info())


def pack(config: NetworkConfig, name: str, value: Floats) -> Floats:
    """A weight of ``network_config`` as these operators want it.

    Norms end in their epsilon; rows of gate and up take turns, so that a thread has both of an output.
    """
    kind = name.rpartition(".")[2]
    if kind in ("attention_norm", "mlp_norm", "norm"):
        return np.append(value, np.float32(config.norm_eps))
    if kind == "gate_up":
        gate_and_up = value.reshape(2, config.intermediate_size, config.hidden_size)
        return np.ascontiguousarray(gate_and_up.swapaxes(0, 1)).reshape(value.shape)
    return value


class NormLinear(nn.Cell):  # type: ignore[misc]
    """RMS norm, then a linear layer: ``[T, in] → [T, out]``."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter, bias: Parameter | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight, self.bias = norm, weight, bias
        self.linear = custom("NormLinear", (F32,) * (4 if bias is None else 5))

    def construct(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.linear(x, self.norm, self.weight)
        return self.linear(x, self.norm, self.weight, self.bias)


class NormGatedLinear(nn.Cell):  # type: ignore[misc]
    """RMS norm, gate and up projection, ``silu(gate) * up``: ``[T, in] → [T, I]``."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm, self.weight = norm, weight
        self.linear = custom("NormGatedLinear", (F32,) * 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(x, self.norm, self.weight)


class ResidualLinear(nn.Cell):  # type: ignore[misc]
    """A linear layer whose result is added to the residual stream."""

    def __init__(self, weight: Parameter, bias: Parameter | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.bias = weight, bias
        self.linear = custom("ResidualLinear", (F32,) * (4 if bias is None else 5))

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
