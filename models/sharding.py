"""One rank's part of a model under tensor parallelism, as Megatron-LM cuts it (arXiv 1909.08053).

What makes heads and MLP units (qkv, gate, up) is cut by its outputs, what takes them (output, down) by its inputs; so a
rank computes whole heads and units, and the ranks' results are summed once after output and once after down. Embedding
and head are cut by tokens. Norms are whole on every rank.

Key/value groups that do not divide by the ranks are filled up with groups of zeros; if there are fewer groups than
ranks, several ranks have the same one and share its query heads. Zeros add nothing to a sum, they only cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import gguf
import numpy as np

from config.manifest import rank_tokens
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.weight_map import Blocks, Floats, Rows, WeightSource

BLOCK = 32  # columns that packed weights have in common: a cut goes between two of them


@dataclass(frozen=True)
class Span:
    """Neighbours among a whole, ``start`` to ``stop``, filled up to ``size`` with zeros."""

    start: int
    stop: int
    size: int

    def times(self, count: int) -> Span:
        """The same in parts, ``count`` to each."""
        return Span(self.start * count, self.stop * count, self.size * count)

    def after(self, offset: int) -> Span:
        """The same in a whole that begins ``offset`` earlier."""
        return Span(self.start + offset, self.stop + offset, self.size)

    def of(self, whole: Rows) -> Rows:
        """These rows of ``whole``."""
        part, missing = whole[self.start : self.stop], self.size - (self.stop - self.start)
        return np.concatenate([part, np.zeros((missing, *whole.shape[1:]), whole.dtype)]) if missing else part


@dataclass(frozen=True)
class Heads:
    """How attention is cut: every rank has ``groups`` key/value heads with ``queries`` query heads on each.

    Where there are fewer key/value heads than ranks, ``copies`` ranks have the same one.
    """

    groups: int
    queries: int
    copies: int

    @classmethod
    def of(cls, config: NetworkConfig, world_size: int) -> Heads:
        """The cut of a network's heads over ``world_size`` ranks."""
        groups, queries = config.num_kv_heads, config.num_heads // config.num_kv_heads
        if groups >= world_size:
            return cls(-(-groups // world_size), queries, 1)
        filled = next(size for size in range(groups, world_size + 1) if world_size % size == 0)
        copies = world_size // filled
        return cls(1, -(-queries // copies), copies)

    def spans(self, config: NetworkConfig, rank: int) -> tuple[Span, Span]:
        """One rank's query heads and key/value heads."""
        kv_heads, queries = config.num_kv_heads, config.num_heads // config.num_kv_heads
        first, part = rank // self.copies * self.groups, rank % self.copies
        start, stop = min(first, kv_heads), min(first + self.groups, kv_heads)
        begin, end = start * queries + part * self.queries, start * queries + (part + 1) * self.queries
        if self.copies == 1:
            end = stop * queries
        end = min(end, stop * queries)
        return Span(min(begin, end), end, self.groups * self.queries), Span(start, stop, self.groups)


class Shard:
    """One rank's part of a checkpoint's weights, read like the whole: a ``WeightSource`` of a smaller network.

    Attributes:
        config: the network that this rank computes.
        first_token: the token of the first row of its embedding and head.
    """

    def __init__(self, whole: WeightSource, rank: int, world_size: int) -> None:
        """Cut, without reading anything.

        Raises:
            CheckpointError: the vocabulary has too few tokens for so many ranks.
        """
        config = whole.config
        self.source = whole.source
        self._whole = whole
        self._rank = rank
        heads = Heads.of(config, world_size)
        self._queries, self._kv_heads = (span.times(config.head_dim) for span in heads.spans(config, rank))
        self._units = _units(config.intermediate_size, rank, world_size)
        tokens = rank_tokens(config.vocab_size, world_size)
        if config.vocab_size <= (world_size - 1) * tokens:
            raise CheckpointError(f"{self.source}: {config.vocab_size} tokens are too few for {world_size} ranks")
        first, end = rank * tokens, min((rank + 1) * tokens, config.vocab_size)
        self._tokens = Span(first, end, end - first)  # not filled up: nobody could tell zeros from real logits
        self.first_token = self._tokens.start
        self.config = replace(
            config,
            num_heads=heads.groups * heads.queries,
            num_kv_heads=heads.groups,
            intermediate_size=self._units.size,
            vocab_size=self._tokens.size,
        )

    def read(self, name: str) -> Floats:
        """A weight of this rank's network: float32, C-contiguous."""
        return np.ascontiguousarray(self._part(name, self._whole.read(name)))

    def block_kind(self, name: str) -> gguf.GGMLQuantizationType | None:
        """The kind of blocks that the checkpoint stores it in, if that is one and no block is cut."""
        inputs = {"output": self._queries, "down": self._units}.get(_role(name))
        if inputs and any(place % BLOCK for place in (inputs.start, inputs.stop)):
            return None
        return self._whole.block_kind(name)

    def read_blocks(self, name: str) -> Blocks | None:
        """The same as the checkpoint stores it, if that is in such blocks."""
        blocks = None if self.block_kind(name) is None else self._whole.read_blocks(name)
        return blocks and replace(blocks, rows=np.ascontiguousarray(self._part(name, blocks.rows)))

    def _part(self, name: str, whole: Rows) -> Rows:
        """This rank's part of a weight ``[outputs, …]``, whose rows may be numbers or the bytes of their blocks."""
        config = self._whole.config
        match _role(name):
            case "embed_tokens" | "head":
                return self._tokens.of(whole)
            case "qkv" | "qkv_bias":
                heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
                keys, values = self._kv_heads.after(heads), self._kv_heads.after(heads + kv_heads)
                return np.concatenate([span.of(whole) for span in (self._queries, keys, values)])
            case "gate_up":
                return np.concatenate([self._units.of(whole), self._units.after(config.intermediate_size).of(whole)])
            case "output":
                return _columns(self._queries, whole, config.num_heads * config.head_dim)
            case "down":
                return _columns(self._units, whole, config.intermediate_size)
            case "output_bias" if self._rank:
                return np.zeros_like(whole)  # the ranks' results are summed
            case _:
                return whole


def cost(config: NetworkConfig, world_size: int) -> list[str]:
    """What ranks compute and hold in vain, as sentences; nothing if all divides."""
    heads = Heads.of(config, world_size)
    all_groups, all_queries = world_size * heads.groups, world_size * heads.groups * heads.queries
    units = world_size * _units(config.intermediate_size, 0, world_size).size
    lines = []
    if all_groups > config.num_kv_heads:
        more = _more(all_groups, config.num_kv_heads)
        heads_of_all = f"{all_groups} key/value heads in the caches of {world_size} ranks for {config.num_kv_heads}"
        lines.append(f"{heads_of_all}, {more} cache for the same tokens")
    if all_queries > config.num_heads:
        more = _more(all_queries, config.num_heads)
        lines.append(f"{all_queries} query heads for {config.num_heads}, {more} weights and work of attention")
    if units > config.intermediate_size:
        more = _more(units, config.intermediate_size)
        lines.append(f"{units} MLP units for {config.intermediate_size}, {more} weights and work of the MLP")
    return lines


def _more(needed: int, whole: int) -> str:
    return f"{100 * (needed - whole) / whole:.0f} % more"


def shards(whole: WeightSource, world_size: int) -> list[Shard]:
    """All ranks' parts.

    Raises:
        CheckpointError: the vocabulary has too few tokens for so many ranks.
    """
    return [Shard(whole, rank, world_size) for rank in range(world_size)]


def _units(count: int, rank: int, world_size: int) -> Span:
    """One rank's share of ``count`` MLP units: the same size on every rank, in whole blocks."""
    size = -(-count // (world_size * BLOCK)) * BLOCK
    return Span(min(rank * size, count), min((rank + 1) * size, count), size)


def _columns(span: Span, whole: Rows, columns: int) -> Rows:
    """These of the ``columns`` that each row of ``whole`` has, in however many items."""
    items = whole.shape[1]
    scaled = Span(*(place * items // columns for place in (span.start, span.stop, span.size)))
    return scaled.of(whole.T).T


def _role(name: str) -> str:
    return name.rpartition(".")[2]
