"""The network of every supported family, read top to bottom: embedding, layers, head.

Shapes: T new tokens of R rows (one row: one request's share of the step), M blocks a row of B tokens, L wanted
positions, H query heads on K key/value heads of D numbers. All of a step's rows stand one after another in the T
tokens, so one call holds several prompts, rows of any length and rows whose first tokens are cached. ``Phase`` says
which rows a graph is for: *prefill* takes any, *decode* only rows of one token; for Ascend *prefill* takes rows without
cached tokens, and *chunk* any.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from models.collectives import Share
from models.network_config import NetworkConfig, RopeScaling
from models.operator_set import OperatorSet
from models.weight_map import Weights

Phase = Literal["prefill", "chunk", "decode"]


class Network(nn.Cell):  # type: ignore[misc]
    """A decoder for one phase, whole or one rank's part of it.

    Inputs: ``token_ids, positions, slot_mapping`` i32 [T]; ``block_tables`` i32 [R, M]; ``query_lens, context_lens``
    i32 [R]; ``logits_indices`` i32 [L]; ``key_cache, value_cache`` [layers * num_blocks, B, K, D], where layer l's
    block b is at l * num_blocks + b, or for Ascend a tuple of [num_blocks, B, K, D] for each layer.

    Outputs: logits f32 [L, vocab] (of a rank: those of its tokens), then from C++ operators the largest of each 64
    neighbouring logits, f32 [L, ceil(vocab / 64)], from operators that leave the cache to the host every layer's new
    keys and values, f32 [layers, T, K, D] each.
    """

    def __init__(
        self,
        config: NetworkConfig,
        weights: Weights,
        operators: OperatorSet,
        phase: Phase,
        block_size: int,
        share: Share | None = None,
    ) -> None:
        """Build it from the Cells of ``operators``.

        ``share``: this network is one rank's, and ``config`` and ``weights`` are its part of the whole's.
        """
        super().__init__(auto_prefix=False)
        table = weights("embed_tokens"), weights("norm")
        self.reduce = None if share is None else share.reduce
        if share is None:
            self.embed = operators.Embedding(*table)
        else:
            self.embed = operators.SharedEmbedding(*table, share.first_token)
        self.geometry = operators.GEOMETRY[phase](constant("rope_frequencies", rope_frequencies(config)), block_size)
        self.layers = nn.CellList(operators.layers(phase, config, weights, self.reduce), auto_prefix=False)
        head = weights("embed_tokens" if config.tied_embeddings else "head")
        self.head = operators.Head(weights("norm"), config.norm_eps, head)

    def construct(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        query_lens: Tensor,
        context_lens: Tensor,
        logits_indices: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Any:
        x = self.embed(token_ids)
        if self.reduce is not None:
            x = self.reduce(x)
        geometry = self.geometry(positions, slot_mapping, block_tables, query_lens, context_lens)
        keys: Any = ()
        values: Any = ()
        for layer in self.layers:
            x, fresh = layer(x, geometry, key_cache, value_cache)
            keys, values = keys + fresh[:1], values + fresh[1:]
        logits = self.head(x, logits_indices)
        if keys:
            return logits, ops.stack(keys), ops.stack(values)
        return logits


def constant(name: str, value: NDArray[np.float32]) -> Parameter:
    """A Parameter that is computed, not read from a checkpoint."""
    return Parameter(Tensor(value), name=name, requires_grad=False)


def rope_frequencies(config: NetworkConfig) -> NDArray[np.float32]:
    """Radians a position turns each of the D / 2 pairs, f32; scaled as the checkpoint says."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies: NDArray[np.float32] = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    return frequencies if config.rope_scaling is None else scale_frequencies(frequencies, config.rope_scaling)


def scale_frequencies(frequencies: NDArray[np.float32], scaling: RopeScaling) -> NDArray[np.float32]:
    """Stretch rotary frequencies: all alike (linear), or only the slow ones with a smooth border (Llama 3)."""
    slowed: NDArray[np.float32] = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slowed
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # within the first training's context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: slowed, 1: as they were
    return ((1 - keep) * slowed + keep * frequencies).astype(np.float32)
