"""Makers of paged MindIR pairs as MindFormers' exporters wrote them, of operators that run on a CPU.

Caches are Parameters that the graphs write. ``paged`` pairs have static or dynamic shapes and no block tables in
prefill; ``paged alike`` pairs take the same four inputs in both graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from whole_weights import Weights

from models import portable
from models.checkpoint import open_checkpoint
from models.graphs import dynamic, write_graph
from models.network import rope_frequencies
from models.network_config import NetworkConfig
from models.weight_map import of_layer


@dataclass(frozen=True)
class PairShape:
    """What an exporter's configuration fixes; None is left open."""

    prefill: tuple[int | None, int | None] = (None, None)  # rows, tokens of each
    decode: int | None = None  # rows
    tables: int | None = None  # blocks of a row
    num_blocks: int = 24
    block_size: int = 4
    cache_dtype: str = "float32"


class PagedAttention(portable.Attention):
    """Attention that writes keys and values into its own cache."""

    def __init__(self, config: NetworkConfig, layer: int, weights: Any, shape: PairShape) -> None:
        super().__init__(config, layer, weights("q_norm"), weights("k_norm"))
        size = (shape.num_blocks, shape.block_size, config.num_kv_heads, config.head_dim)
        names = [f"model.layers.{layer}.attention.paged_attention_mgr.{kind}_cache" for kind in ("key", "value")]
        self.key_cache, self.value_cache = (
            Parameter(Tensor(np.zeros(size, shape.cache_dtype)), name=name, requires_grad=False) for name in names
        )
        self.block_size = shape.block_size
        self.update = ops.ScatterNdUpdate()

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Both caches, with new keys and values in them; padding of either convention lands in the null block."""
        slots = ops.maximum(slots, ops.zeros_like(slots))
        places = ops.stack((slots // self.block_size, slots % self.block_size), 1)
        keys, values = ops.cast(keys, self.key_cache.dtype), ops.cast(values, self.value_cache.dtype)
        return self.update(self.key_cache, places, keys), self.update(self.value_cache, places, values)

    def mix(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of ``q [R, Q, H, D]`` over ``keys`` and ``values [R, S, K, D]``; mask ``[R or 1, 1, 1, Q, S]``."""
        rows, queries = ops.shape(q)[:2]
        q = q.reshape((rows, queries, self.kv_heads, self.groups, self.head_dim)).transpose((0, 2, 3, 1, 4))
        keys, values = (ops.cast(x, ms.float32).transpose((0, 2, 1, 3)).expand_dims(2) for x in (keys, values))
        keys = ops.tile(keys, (1, 1, self.groups, 1, 1))
        values = ops.tile(values, (1, 1, self.groups, 1, 1))
        out = self.weigh(ops.softmax(self.scores(q, keys) * self.scale + mask, -1), values)  # [R, K, G, Q, D]
        return out.transpose((0, 3, 1, 2, 4)).reshape((-1, self.heads * self.head_dim))


class PrefillAttention(PagedAttention):
    """Each row's prompt looks at itself."""

    def construct(self, qkv: Tensor, geometry: Any, tables: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.heads_of(qkv, geometry)
        written = self.write(k, v, slots)
        rows, width = ops.shape(tokens)
        number = portable.numbers(tokens[0])
        mask = portable.additive(number.expand_dims(1) >= number)
        q = ops.depend(q, written)
        shape = (rows, width, self.kv_heads, self.head_dim)
        return self.mix(q.reshape((rows, width, self.heads, self.head_dim)), k.reshape(shape), v.reshape(shape), mask)


class DecodeAttention(PagedAttention):
    """Each row's one token looks at its blocks."""

    def construct(self, qkv: Tensor, geometry: Any, tables: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.heads_of(qkv, geometry)
        caches = self.write(k, v, slots)
        rows, blocks = ops.shape(tables)
        offset = portable.numbers(ops.tile(tables[0], (self.block_size,)))
        mask = portable.additive(offset < lengths.expand_dims(1)).reshape((rows, 1, 1, 1, -1))
        shape = (rows, blocks * self.block_size, self.kv_heads, self.head_dim)
        keys, values = (ops.gather(cache, tables.reshape((-1,)), 0).reshape(shape) for cache in caches)
        return self.mix(q.expand_dims(1), keys, values, mask)


class Layer(nn.Cell):  # type: ignore[misc]
    def __init__(self, config: NetworkConfig, index: int, weights: Any, attention: PagedAttention) -> None:
        super().__init__(auto_prefix=False)
        eps = config.norm_eps
        self.qkv = portable.NormLinear(weights("attention_norm"), eps, weights("qkv"), weights("qkv_bias"))
        self.attend = attention
        self.output = portable.Linear(weights("output"), weights("output_bias"))
        self.gate_up = portable.NormGatedLinear(weights("mlp_norm"), eps, weights("gate_up"))
        self.down = portable.Linear(weights("down"), None)

    def construct(self, x: Tensor, geometry: Any, tables: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        x = x + self.output(self.attend(self.qkv(x), geometry, tables, slots, rows))
        return x + self.down(self.gate_up(x))


class Decoder(nn.Cell):  # type: ignore[misc]
    """What both phases have in common."""

    attention: type[PagedAttention]
    every_position = False

    def __init__(self, config: NetworkConfig, weights: Any, shape: PairShape) -> None:
        super().__init__(auto_prefix=False)
        self.embed = portable.Embedding(weights("embed_tokens"), weights("norm"))
        frequencies = Parameter(Tensor(rope_frequencies(config)), name="freqs", requires_grad=False)
        self.rope = portable.Rope(frequencies)
        layers = [
            Layer(config, i, of_layer(weights, i), self.attention(config, i, of_layer(weights, i), shape))
            for i in range(config.num_layers)
        ]
        self.layers = nn.CellList(layers, auto_prefix=False)
        head = weights("embed_tokens" if config.tied_embeddings else "head")
        self.head = portable.Head(weights("norm"), config.norm_eps, head)

    def prompt(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """Logits of the last token of each prompt in ``tokens [R, S]``, or of all of them, ``[R, S, vocab]``."""
        positions = (ops.cumsum(ops.ones_like(tokens), 1) - 1).reshape((-1,))
        geometry = self.rope(positions)
        x = self.embed(tokens.reshape((-1,)))
        for layer in self.layers:
            x = layer(x, geometry, tokens, slots, tokens)
        if self.every_position:
            return self.head(x, portable.numbers(slots)).reshape((*ops.shape(tokens), -1))
        lengths = lengths.reshape((-1,))
        return self.head(x, portable.numbers(lengths) * ops.shape(tokens)[1] + lengths - 1)

    def next(self, tokens: Tensor, lengths: Tensor, tables: Tensor, slots: Tensor) -> Tensor:
        """Logits ``[R, 1, vocab]`` after the one token of each row in ``tokens [R, 1]``."""
        lengths = lengths.reshape((-1,))
        geometry = self.rope(lengths - 1)
        x = self.embed(tokens.reshape((-1,)))
        for layer in self.layers:
            x = layer(x, geometry, tables, slots, lengths)
        return self.head(x, portable.numbers(lengths)).expand_dims(1)


class PagedPrefill(Decoder):
    attention = PrefillAttention

    def construct(self, tokens: Tensor, batch_valid_length: Tensor, slot_mapping: Tensor) -> Any:
        return self.prompt(tokens, batch_valid_length, slot_mapping), tokens


class PagedAlikePrefill(Decoder):
    attention = PrefillAttention
    every_position = True

    def construct(
        self, input_ids: Tensor, batch_valid_length: Tensor, block_tables: Tensor, slot_mapping: Tensor
    ) -> Any:
        tokens = input_ids  # MindSpore names the input after this
        return self.prompt(tokens, batch_valid_length, slot_mapping)


class PagedDecode(Decoder):
    attention = DecodeAttention

    def construct(
        self, input_ids: Tensor, batch_valid_length: Tensor, block_tables: Tensor, slot_mapping: Tensor
    ) -> Any:
        tokens = input_ids
        return self.next(tokens, batch_valid_length, block_tables, slot_mapping), tokens


def write_paged_pair(
    checkpoint: Path, folder: Path, *, alike: bool, shape: PairShape, lengths_as: str = "vector"
) -> tuple[Path, Path]:
    """Export a checkpoint as such a pair. ``lengths_as``: a vector, a row [1, bs] or a column [bs, 1]."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    opened = open_checkpoint(checkpoint)
    weights = Weights(opened).get
    paths = folder / "prefill.mindir", folder / "decode.mindir"
    folder.mkdir(parents=True, exist_ok=True)
    (rows, width), tables = shape.prefill, dynamic(ms.int32, shape.decode, shape.tables)
    slots = dynamic(ms.int32, rows * width if rows and width else None)
    inputs = [dynamic(ms.int32, rows, width), lengths(rows, lengths_as), slots]
    if alike:
        inputs.insert(2, dynamic(ms.int32, rows, shape.tables))
    prefill = PagedAlikePrefill if alike else PagedPrefill
    write_graph(prefill(opened.config, weights, shape), paths[0], *inputs)
    inputs = [dynamic(ms.int32, shape.decode, 1), lengths(shape.decode, lengths_as), tables]
    write_graph(PagedDecode(opened.config, weights, shape), paths[1], *inputs, dynamic(ms.int32, shape.decode))
    return paths


def lengths(rows: int | None, shape: str) -> Tensor:
    """The input of lengths."""
    return dynamic(ms.int32, *{"vector": (rows,), "row": (1, rows), "column": (rows, 1)}[shape])
