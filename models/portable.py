"""The operators that matter for speed, written with MindSpore's standard ones: they run wherever MindSpore does.

This is one side of a small seam. The other is ``models.native``: Cells with the same names and arguments around C++. A
network is built from either.

Standard operators cannot write into a graph's input, so here the *host* writes the cache (manifest: ``cache_write``):
the graph returns each layer's new keys and values, and attention reads cached tokens from the cache and this step's
tokens from the step itself.

Shapes: T new tokens of R rows, H query heads in G groups on K key/value heads of D numbers, M blocks a row of B tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from config.serving_config import WeightFormat
from models.network_config import NetworkConfig
from models.weight_map import Floats, Weights, WeightSource, of_layer

MAX_STEP_TOKENS = 128  # MindSpore reuses little memory within a step, so its peak grows with the tokens
MASKED = -1e30  # added to a score that must not count; finite, so that no row turns into NaN


def names(config: NetworkConfig) -> Collection[str]:
    """What the Cells below ask for: the network's weights, as they are."""
    return config.weight_shapes().keys()


def layout(source: WeightSource, name: str, weights: WeightFormat) -> tuple[Any, tuple[int, ...]]:
    """MindSpore's dtype and the shape of what ``read`` returns."""
    return ms.float32, source.config.weight_shapes()[name]


def read(source: WeightSource, name: str, weights: WeightFormat) -> Floats:
    """A weight as these operators want it: as it is."""
    return source.read(name)


class Embedding(nn.Cell):  # type: ignore[misc]
    """The rows of the tokens: i32 ``[T] → [T, hidden]``."""

    def __init__(self, weight: Parameter, norm: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight

    def construct(self, token_ids: Tensor) -> Tensor:
        return ops.gather(self.weight, token_ids, 0)


class SharedEmbedding(nn.Cell):  # type: ignore[misc]
    """The same where this rank has the rows from ``first_token`` on, and zeros for the tokens of the others."""

    def __init__(self, weight: Parameter, norm: Parameter, first_token: int) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight
        self.first_token, self.num_rows = first_token, weight.shape[0]

    def construct(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self.first_token
        here = ops.logical_and(rows >= 0, rows < self.num_rows)
        x = ops.gather(self.weight, rows * ops.cast(here, ms.int32), 0)
        return x * ops.cast(here, self.weight.dtype).expand_dims(1)


class RMSNorm(nn.Cell):  # type: ignore[misc]
    """``x / rms(x) * weight`` over the last axis."""

    def __init__(self, weight: Parameter, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight
        self.eps = eps

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt(ops.mean(x * x, -1, True) + self.eps) * self.weight


class Linear(nn.Cell):  # type: ignore[misc]
    """``x [T, in] → [T, out]`` with a weight of ``[out, in]``."""

    def __init__(self, weight: Parameter, bias: Parameter | None) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight
        self.bias = bias
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        y = self.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class NormLinear(nn.Cell):  # type: ignore[misc]
    """RMS norm, then a linear layer."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter, bias: Parameter | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.norm = RMSNorm(norm, eps)
        self.linear = Linear(weight, bias)

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Head(nn.Cell):  # type: ignore[misc]
    """RMS norm and vocabulary at the wanted positions: logits ``[L, V]``."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.linear = NormLinear(norm, eps, weight)

    def construct(self, x: Tensor, logits_indices: Tensor) -> Tensor:
        return self.linear(ops.gather(x, logits_indices, 0))


class NormGatedLinear(nn.Cell):  # type: ignore[misc]
    """RMS norm, gate and up projection in one weight ``[2 * I, in]``, ``silu(gate) * up``: ``[T, in] → [T, I]``."""

    def __init__(self, norm: Parameter, eps: float, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.linear = NormLinear(norm, eps, weight)
        self.split = ops.Split(axis=1, output_num=2)

    def construct(self, x: Tensor) -> Tensor:
        gate, up = self.split(self.linear(x))
        return gate * ops.sigmoid(gate) * up


class ResidualLinear(nn.Cell):  # type: ignore[misc]
    """A linear layer whose result, of several ranks their sum, is added to the residual stream."""

    def __init__(self, weight: Parameter, bias: Parameter | None, reduce: Any) -> None:
        super().__init__(auto_prefix=False)
        self.linear = Linear(weight, bias)
        self.reduce = reduce

    def construct(self, residual: Tensor, x: Tensor) -> Tensor:
        y = self.linear(x)
        return residual + (y if self.reduce is None else self.reduce(y))


class Rope(nn.Cell):  # type: ignore[misc]
    """Cosines and sines ``[T, 1, D / 2]`` of the tokens' positions, in f32 as the checkpoints' authors compute them."""

    def __init__(self, frequencies: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.frequencies = frequencies  # [D / 2]

    def construct(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = ops.cast(positions, ms.float32).reshape((-1, 1, 1)) * self.frequencies
        return ops.cos(angles), ops.sin(angles)


def numbers(like: Tensor) -> Tensor:
    """0, 1, 2 … along the first axis of ``like``: a range whose length a graph takes from a shape."""
    return ops.cumsum(ops.ones_like(like), 0) - 1


def additive(allowed: Tensor) -> Tensor:
    """A boolean mask as what to add to scores."""
    return (1.0 - ops.cast(allowed, ms.float32)) * MASKED


class PrefillGeometry(nn.Cell):  # type: ignore[misc]
    """Which keys each token of a step may look at: ``(cos, sin, block_tables, mask [T, R * M * B + T])``."""

    def __init__(self, frequencies: Parameter, block_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.rope = Rope(frequencies)
        self.block_size = block_size

    def construct(
        self, positions: Tensor, slot_mapping: Tensor, block_tables: Tensor, query_lens: Tensor, context_lens: Tensor
    ) -> Any:
        cos, sin = self.rope(positions)
        token = numbers(positions)  # [T]
        row = ops.cast(token.expand_dims(1) >= ops.cumsum(query_lens, 0), ms.int32).sum(1)  # [T]
        offset = numbers(ops.tile(block_tables[0], (self.block_size,)))  # [M * B]
        cached = offset < (context_lens - query_lens).expand_dims(1)  # [R, M * B]
        own = row.expand_dims(1) == numbers(query_lens)  # [T, R]
        past = ops.logical_and(own.expand_dims(2), cached.expand_dims(0)).reshape((ops.shape(positions)[0], -1))
        fresh = ops.logical_and(row.expand_dims(1) == row, token.expand_dims(1) >= token)  # [T, T]
        return cos, sin, block_tables, ops.concat((additive(past), additive(fresh)), 1)


class DecodeGeometry(nn.Cell):  # type: ignore[misc]
    """Which cached tokens each row's one token may look at: ``(cos, sin, block_tables, mask [R, 1, 1, M * B + 1])``."""

    def __init__(self, frequencies: Parameter, block_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.rope = Rope(frequencies)
        self.block_size = block_size

    def construct(
        self, positions: Tensor, slot_mapping: Tensor, block_tables: Tensor, query_lens: Tensor, context_lens: Tensor
    ) -> Any:
        cos, sin = self.rope(positions)
        offset = numbers(ops.tile(block_tables[0], (self.block_size,)))
        cached = offset < (context_lens - query_lens).expand_dims(1)  # [R, M * B]
        itself = query_lens.expand_dims(1) > 0
        mask = additive(ops.concat((cached, itself), 1))
        return cos, sin, block_tables, mask.expand_dims(1).expand_dims(1)


class Attention(nn.Cell):  # type: ignore[misc]
    """One layer's rotary embedding and attention over cached and new tokens.

    ``construct(qkv, geometry, key_cache, value_cache) -> (out [T, H * D], (new keys [T, K, D], new values [T, K, D]))``
    with what the phase's geometry Cell returned.
    """

    def __init__(self, config: NetworkConfig, layer: int, q_norm: Parameter | None, k_norm: Parameter | None) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.num_layers = config.num_layers
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.groups = config.num_heads // config.num_kv_heads
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.q_norm = None if q_norm is None else RMSNorm(q_norm, config.norm_eps)
        self.k_norm = None if k_norm is None else RMSNorm(k_norm, config.norm_eps)
        self.qkv_split = (config.num_heads * self.head_dim,) + (config.num_kv_heads * self.head_dim,) * 2
        self.halves = ops.Split(axis=2, output_num=2)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.weigh = ops.BatchMatMul()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of ``x [T, heads, D]``; ``cos`` and ``sin`` are ``[T, 1, D / 2]``."""
        first, second = self.halves(x)
        return ops.concat((first * cos - second * sin, second * cos + first * sin), 2)

    def heads_of(self, qkv: Tensor, geometry: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, H, D]``, keys and values ``[T, K, D]``, positions applied."""
        q, k, v = ops.split(qkv, self.qkv_split, 1)
        q = q.reshape((-1, self.heads, self.head_dim))
        k = k.reshape((-1, self.kv_heads, self.head_dim))
        v = v.reshape((-1, self.kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rotate(q, geometry[0], geometry[1]), self.rotate(k, geometry[0], geometry[1]), v

    def cached(self, cache: Tensor, tables: Tensor) -> Tensor:
        """This layer's blocks of all rows, ``[R * M, B, K, D]`` in f32."""
        first = self.layer * (ops.shape(cache)[0] // self.num_layers)
        return ops.cast(ops.gather(cache, tables.reshape((-1,)) + first, 0), ms.float32)


class PrefillAttention(Attention):
    """Rows of any length: every token looks at the cached and new tokens of all rows, and a mask leaves its own.

    The mask keeps the graph free of shapes that depend on values; its price is work that grows with the square of the
    step's tokens, not of the row's. The C++ operator does not pay it.
    """

    def construct(self, qkv: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        q, k, v = self.heads_of(qkv, geometry)
        keys = self.with_cached(k, key_cache, geometry[2])  # [K, S, D], S = R * M * B + T
        values = self.with_cached(v, value_cache, geometry[2])
        q = q.reshape((-1, self.kv_heads, self.groups, self.head_dim)).transpose((1, 2, 0, 3))  # [K, G, T, D]
        scores = self.scores(q.reshape((self.kv_heads, -1, self.head_dim)), keys) * self.scale  # [K, G * T, S]
        mask = geometry[3]  # [T, S]
        scores = scores.reshape((self.kv_heads, self.groups, *ops.shape(mask))) + mask
        weights = ops.softmax(scores, -1).reshape((self.kv_heads, -1, ops.shape(mask)[1]))
        out = self.weigh(weights, values).reshape((self.kv_heads, self.groups, -1, self.head_dim))
        return out.transpose((2, 0, 1, 3)).reshape((-1, self.heads * self.head_dim)), (k, v)

    def with_cached(self, new: Tensor, cache: Tensor, tables: Tensor) -> Tensor:
        """Cached tokens of all rows, then the step's own: ``[K, S, D]``."""
        cached = self.cached(cache, tables).reshape((-1, self.kv_heads, self.head_dim))
        return ops.concat((cached, new), 0).transpose((1, 0, 2))


class DecodeAttention(Attention):
    """Rows of one token: each looks at its own cached tokens and at itself."""

    def construct(self, qkv: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        q, k, v = self.heads_of(qkv, geometry)
        keys = self.with_cached(k, key_cache, geometry[2])  # [R, K, S, D], S = M * B + 1
        values = self.with_cached(v, value_cache, geometry[2])
        q = q.reshape((-1, self.kv_heads, self.groups, self.head_dim))
        scores = self.scores(q, keys) * self.scale + geometry[3]  # [R, K, G, S] + [R, 1, 1, S]
        out = self.weigh(ops.softmax(scores, -1), values)
        return out.reshape((-1, self.heads * self.head_dim)), (k, v)

    def with_cached(self, new: Tensor, cache: Tensor, tables: Tensor) -> Tensor:
        """Each row's cached tokens, then its new one: ``[R, K, S, D]``."""
        rows, blocks = ops.shape(tables)
        cached = self.cached(cache, tables)  # [R * M, B, K, D]
        cached = cached.reshape((rows, blocks * ops.shape(cached)[1], self.kv_heads, self.head_dim))
        return ops.concat((cached, new.expand_dims(1)), 1).transpose((0, 2, 1, 3))


class DecoderLayer(nn.Cell):  # type: ignore[misc]
    """Attention and gated MLP, each on the residual stream.

    ``construct(x [T, hidden], geometry, key_cache, value_cache) -> (x, (new keys [T, K, D], new values [T, K, D]))``
    with what the phase's geometry Cell returned.
    """

    attention: type[Attention]

    def __init__(self, config: NetworkConfig, index: int, weights: Weights, reduce: Any = None) -> None:
        """``reduce`` sums up the results of several ranks."""
        super().__init__(auto_prefix=False)
        eps = config.norm_eps
        self.qkv = NormLinear(weights("attention_norm"), eps, weights("qkv"), weights("qkv_bias"))
        self.attend = self.attention(config, index, weights("q_norm"), weights("k_norm"))
        self.output = ResidualLinear(weights("output"), weights("output_bias"), reduce)
        self.gate_up = NormGatedLinear(weights("mlp_norm"), eps, weights("gate_up"))
        self.down = ResidualLinear(weights("down"), None, reduce)

    def construct(self, x: Tensor, geometry: Any, key_cache: Tensor, value_cache: Tensor) -> Any:
        attended, fresh = self.attend(self.qkv(x), geometry, key_cache, value_cache)
        x = self.output(x, attended)
        return self.down(x, self.gate_up(x)), fresh


class PrefillLayer(DecoderLayer):
    """For rows of any length."""

    attention = PrefillAttention


class DecodeLayer(DecoderLayer):
    """For rows of one token."""

    attention = DecodeAttention


GEOMETRY = {"prefill": PrefillGeometry, "decode": DecodeGeometry}
LAYER = {"prefill": PrefillLayer, "decode": DecodeLayer}


def layers(phase: str, config: NetworkConfig, weights: Weights, reduce: Any = None) -> list[nn.Cell]:
    """A network's layers, each a Cell; ``reduce`` sums up the results of several ranks."""
    return [LAYER[phase](config, i, of_layer(weights, i), reduce) for i in range(config.num_layers)]
