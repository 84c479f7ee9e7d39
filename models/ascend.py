"""The operators that matter for speed, as those that an Ascend NPU has: the third side of ``models.portable``'s seam.

The *graph* writes the cache, which is one tensor a layer for keys and one for values, ``[num_blocks, B, K, D]`` each.
A graph for each kind of step, because each wants another attention:

======== ================================================== ===================================================
phase    a step whose rows                                  attention
======== ================================================== ===================================================
prefill  have nothing in the cache before                   FlashAttentionScore over the step's own tokens
chunk    are of any length, on any cached context           PagedAttention with query lengths and a mask
decode   have one token each                                PagedAttention
======== ================================================== ===================================================

``docs/ascend.md`` says what is assumed of each operator. ``models.ascend_mirror`` has them for the CPU, so that these
very Cells can be run and compared where there is no NPU.

Shapes: T new tokens of R rows, M blocks a row of B tokens, L wanted positions, H query heads on K key/value heads of D
numbers. All numbers have one dtype, bfloat16 or float16; logits are float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16
from mindspore.ops import auto_generate
from numpy.typing import NDArray

from config.serving_config import WeightFormat
from models.network import Phase
from models.network_config import NetworkConfig
from models.portable import Embedding, Linear, ResidualLinear, SharedEmbedding
from models.weight_map import Weights, WeightSource, of_layer

MAX_STEP_TOKENS = None  # as many as the configuration allows
PHASES: tuple[Phase, ...] = ("prefill", "chunk", "decode")
DTYPES = {"bfloat16": bfloat16, "float16": np.float16}  # that the NPU's attention takes
UNBOUNDED = 2147483647  # tokens: FlashAttentionScore looks at all that its mask leaves
PREFILL_MASK = 128  # tokens: rows and columns of the triangle that FlashAttentionScore tiles over a row of any length
MASKED = -10000.0  # added to a score that must not count


def names(config: NetworkConfig) -> Collection[str]:
    """What the Cells below ask for: the network's weights, as they are."""
    return config.weight_shapes().keys()


def layout(source: WeightSource, name: str, weights: WeightFormat) -> tuple[Any, tuple[int, ...]]:
    """MindSpore's dtype and the shape of what ``read`` returns."""
    return getattr(ms, weights), source.config.weight_shapes()[name]


def read(source: WeightSource, name: str, weights: WeightFormat) -> NDArray[Any]:
    """A weight as these operators want it: in the graph's dtype."""
    return source.read(name).astype(DTYPES.get(weights, np.float32))


@dataclass(frozen=True)
class Operators:
    """What ``Network`` is built from, as ``portable`` and ``native`` are.

    Attributes:
        primitives: where the NPU's operators come from, by MindSpore's names.
        dtype: of all numbers, a NumPy dtype.
        context_length: the longest position is before it.
    """

    primitives: Any
    dtype: Any
    context_length: int

    @property
    def Embedding(self) -> Any:
        return Embedding

    @property
    def SharedEmbedding(self) -> Any:
        return SharedEmbedding

    @property
    def Head(self) -> Any:
        return partial(Head, self.primitives)

    @property
    def GEOMETRY(self) -> Mapping[str, Any]:
        return {phase: partial(Geometry, self, phase) for phase in PHASES}

    def layers(self, phase: str, config: NetworkConfig, weights: Weights, reduce: Any = None) -> list[nn.Cell]:
        """A network's layers, each a Cell; ``reduce`` sums up the results of several ranks."""
        own = [of_layer(weights, i) for i in range(config.num_layers)]
        return [DecoderLayer(self.primitives, phase, config, i, its, reduce) for i, its in enumerate(own)]


def npu(weights: WeightFormat, context_length: int) -> Operators:
    """The NPU's own operators in the dtype ``weights``."""
    return Operators(auto_generate, DTYPES[weights], context_length)


class RMSNorm(nn.Cell):  # type: ignore[misc]
    """``x / rms(x) * weight`` over the last axis."""

    def __init__(self, primitives: Any, weight: Parameter, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight
        self.norm = primitives.RmsNorm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight)[0]


class Head(nn.Cell):  # type: ignore[misc]
    """RMS norm and vocabulary at the wanted positions: logits f32 ``[L, V]``."""

    def __init__(self, primitives: Any, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.norm = RMSNorm(primitives, norm, eps)
        self.linear = Linear(weight, None)

    def construct(self, x: Tensor, logits_indices: Tensor) -> Tensor:
        return ops.cast(self.linear(self.norm(ops.gather(x, logits_indices, 0))), ms.float32)


class Geometry(nn.Cell):  # type: ignore[misc]
    """What attention knows of a step: ``(cos, sin, slot_mapping, block_tables, query_lens, context_lens, mask)``.

    ``cos`` and ``sin`` are ``[T, D]``, rows of tables that were computed in float32 as the checkpoints' authors do.
    The mask is the triangle of one prefill tile, ``[T, context_length]`` for a chunk, and None for decode.
    """

    def __init__(self, side: Operators, phase: str, frequencies: Parameter, block_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.phase = phase
        positions = np.arange(side.context_length, dtype=np.float32)
        angles = np.tile(positions[:, None] * frequencies.asnumpy(), 2)  # [context_length, D]: both halves alike
        self.cos, self.sin = table("rope_cos", np.cos(angles), side), table("rope_sin", np.sin(angles), side)
        if phase == "prefill":
            # MindSpore's users give ones in bfloat16, and what is to be added in float16
            masked = 1.0 if side.dtype == bfloat16 else MASKED
            triangle = np.triu(np.full((PREFILL_MASK, PREFILL_MASK), masked, np.float32), 1)
            self.mask = table("prefill_mask", triangle, side)
        elif phase == "chunk":
            self.places = Parameter(
                Tensor(np.arange(side.context_length, dtype=np.int32)), name="places", requires_grad=False
            )

    def construct(
        self, positions: Tensor, slot_mapping: Tensor, block_tables: Tensor, query_lens: Tensor, context_lens: Tensor
    ) -> Any:
        cos, sin = ops.gather(self.cos, positions, 0), ops.gather(self.sin, positions, 0)
        mask: Any = None
        if self.phase == "prefill":
            mask = self.mask
        elif self.phase == "chunk":
            mask = ops.cast(self.places > positions.expand_dims(1), self.cos.dtype) * MASKED
        return cos, sin, slot_mapping, block_tables, query_lens, context_lens, mask


class Attention(nn.Cell):  # type: ignore[misc]
    """One layer's rotary embedding, cache writing and attention: ``qkv [T, (H + 2 K) * D] → [T, H * D]``."""

    def __init__(self, primitives: Any, phase: str, config: NetworkConfig, index: int, weights: Weights) -> None:
        super().__init__(auto_prefix=False)
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.phase, self.index, self.head_dim = phase, index, head_dim
        self.sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        q_norm, k_norm = weights("q_norm"), weights("k_norm")
        self.q_norm = None if q_norm is None else RMSNorm(primitives, q_norm, config.norm_eps)
        self.k_norm = None if k_norm is None else RMSNorm(primitives, k_norm, config.norm_eps)
        scale = 1.0 / math.sqrt(head_dim)
        self.split = auto_generate.SplitWithSize()
        self.rotate = primitives.ApplyRotaryPosEmb(2)  # cos and sin have a row for each token; halves, not pairs
        self.write = primitives.ReshapeAndCache()
        self.flash = primitives.FlashAttentionScore(
            head_num=heads, scale_value=scale, pre_tokens=UNBOUNDED, next_tokens=UNBOUNDED, input_layout="TH"
        )
        self.paged = primitives.PagedAttention(heads, scale, kv_heads)

    def construct(self, qkv: Tensor, geometry: Any, key_caches: Any, value_caches: Any) -> Tensor:
        cos, sin, slot_mapping, block_tables, query_lens, context_lens, mask = geometry
        q, k, v = self.split(qkv, self.sizes, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.by_head(self.q_norm, q, self.sizes[0]), self.by_head(self.k_norm, k, self.sizes[1])
        q, k = self.rotate(q, k, cos, sin, context_lens)
        keys, values = key_caches[self.index], value_caches[self.index]
        q = ops.depend(q, self.write(k, v, keys, values, slot_mapping))
        if self.phase == "prefill":
            return self.flash(q, k, v, None, None, None, mask, None, query_lens, context_lens)[3]
        if self.phase == "chunk":
            return self.paged(q, keys, values, block_tables, context_lens, None, None, mask, query_lens)
        return self.paged(q, keys, values, block_tables, context_lens)

    def by_head(self, norm: RMSNorm, x: Tensor, size: int) -> Tensor:
        """The norm of each head's numbers of ``x [T, size]``."""
        return norm(x.reshape((-1, self.head_dim))).reshape((-1, size))


class DecoderLayer(nn.Cell):  # type: ignore[misc]
    """Attention and gated MLP, each on the residual stream.

    ``construct(x [T, hidden], geometry, key_caches, value_caches) -> (x, ())``, the caches of all layers: nothing is
    left for the host to write. ``reduce`` sums up the results of several ranks.
    """

    def __init__(
        self,
        primitives: Any,
        phase: str,
        config: NetworkConfig,
        index: int,
        weights: Weights,
        reduce: Any = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.attention_norm = RMSNorm(primitives, weights("attention_norm"), config.norm_eps)
        self.qkv = Linear(weights("qkv"), weights("qkv_bias"))
        self.attend = Attention(primitives, phase, config, index, weights)
        self.output = ResidualLinear(weights("output"), weights("output_bias"), reduce)
        self.mlp_norm = RMSNorm(primitives, weights("mlp_norm"), config.norm_eps)
        self.gate_up = Linear(weights("gate_up"), None)
        self.activate = primitives.Swiglu()
        self.down = ResidualLinear(weights("down"), None, reduce)

    def construct(self, x: Tensor, geometry: Any, key_caches: Any, value_caches: Any) -> Any:
        x = self.output(x, self.attend(self.qkv(self.attention_norm(x)), geometry, key_caches, value_caches))
        return self.down(x, self.activate(self.gate_up(self.mlp_norm(x)), -1)), ()


class ReadBlocks(nn.Cell):  # type: ignore[misc]
    """The tokens of blocks i32 ``[C]`` in each of the caches: ``[C * B, K * D]`` each.

    Copying takes this graph and the next: within one, MindSpore would copy whole caches between reading and writing.
    """

    def construct(self, blocks: Tensor, *caches: Tensor) -> Any:
        tokens: Any = ()
        for cache in caches:
            tokens = (*tokens, ops.gather(cache, blocks, 0).reshape((-1, cache.shape[2] * cache.shape[3])))
        return tokens


class WriteBlocks(nn.Cell):  # type: ignore[misc]
    """Writes such tokens to slots i32 ``[C * B]``: given first those of each cache, then the caches."""

    def __init__(self, primitives: Any, num_layers: int) -> None:
        super().__init__(auto_prefix=False)
        self.num_layers = num_layers
        self.write = primitives.ReshapeAndCache()

    def construct(self, slots: Tensor, *tokens_and_caches: Tensor) -> Tensor:
        n = self.num_layers
        for i in range(n):
            keys, values = tokens_and_caches[i], tokens_and_caches[n + i]
            written = self.write(keys, values, tokens_and_caches[2 * n + i], tokens_and_caches[3 * n + i], slots)
            slots = ops.depend(slots, written)
        return slots


def table(name: str, values: NDArray[np.float32], side: Operators) -> Parameter:
    """A constant of the graph in its dtype."""
    return Parameter(Tensor(values.astype(side.dtype)), name=name, requires_grad=False)
