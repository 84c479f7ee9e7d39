"""One rank's part of a model: the ranks' results sum up to the whole's, however heads and units divide."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import native
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.sharding import Shard, cost, shards
from models.weight_format import Kind, quantised
from models.weight_map import Blocks, Floats

HEAD_DIM, HIDDEN, VOCAB = 32, 64, 77


def network(groups: int, queries: int, units: int) -> NetworkConfig:
    return NetworkConfig(
        architecture="llama",
        num_layers=1,
        hidden_size=HIDDEN,
        num_heads=groups * queries,
        num_kv_heads=groups,
        head_dim=HEAD_DIM,
        intermediate_size=units,
        vocab_size=VOCAB,
        context_length=8,
        norm_eps=1e-5,
        rope_theta=1e4,
        qkv_bias=True,
        output_bias=True,
    )


@dataclass
class RandomWeights:
    """A model whose weights are random, but the same each time they are read."""

    config: NetworkConfig
    source: str = "random"

    def read(self, name: str) -> Floats:
        numbers = np.random.default_rng(sum(name.encode()))
        return numbers.standard_normal(self.config.weight_shapes()[name]).astype(np.float32)

    def block_kind(self, name: str) -> Kind | None:
        return Kind.Q8_0

    def read_blocks(self, name: str) -> Blocks | None:
        return quantised(self.read(name), Kind.Q8_0)


def attended(config: NetworkConfig, weights: Shard | RandomWeights, x: Floats) -> Floats:
    """A layer's first half with something simpler in place of norm, rotary embedding and softmax."""
    qkv = weights.read("layers.0.qkv") @ x + weights.read("layers.0.qkv_bias")
    q, k, v = np.split(qkv.reshape(-1, HEAD_DIM), np.cumsum([config.num_heads, config.num_kv_heads]))
    queries = config.num_heads // config.num_kv_heads
    heads = 2 * q + np.repeat(v - k, queries, axis=0) * (np.abs(q).sum(axis=1, keepdims=True) > 0)
    y: Floats = weights.read("layers.0.output") @ heads.reshape(-1) + weights.read("layers.0.output_bias")
    return y


def gated(weights: Shard | RandomWeights, x: Floats) -> Floats:
    gate, up = np.split(weights.read("layers.0.gate_up") @ x, 2)
    y: Floats = weights.read("layers.0.down") @ (gate * np.abs(gate) * up)
    return y


networks = given(
    groups=st.integers(1, 9), queries=st.integers(1, 7), units=st.integers(1, 200), world_size=st.integers(2, 9)
)
few = settings(max_examples=25, deadline=None)


@few
@networks
def test_ranks_sum_up_to_the_whole(groups: int, queries: int, units: int, world_size: int) -> None:
    config = network(groups, queries, units)
    whole = RandomWeights(config)
    ranks = shards(whole, world_size)
    x = whole.read("norm")
    np.testing.assert_allclose(
        sum(attended(rank.config, rank, x) for rank in ranks), attended(config, whole, x), rtol=1e-3, atol=1e-2
    )
    np.testing.assert_allclose(sum(gated(rank, x) for rank in ranks), gated(whole, x), rtol=1e-3, atol=1e-1)


@few
@networks
def test_ranks_are_of_one_shape_and_have_what_it_says(groups: int, queries: int, units: int, world_size: int) -> None:
    whole = RandomWeights(network(groups, queries, units))
    ranks = shards(whole, world_size)
    for rank in ranks:
        for name, shape in rank.config.weight_shapes().items():
            assert rank.read(name).shape == shape, name
            assert rank.read(name).flags.c_contiguous
            if name.rpartition(".")[2] not in ("embed_tokens", "head"):
                assert shape == ranks[0].config.weight_shapes()[name]


@given(world_size=st.integers(2, 11))
def test_tokens_are_one_after_another(world_size: int) -> None:
    whole = RandomWeights(network(2, 2, 64))
    ranks = shards(whole, world_size)
    assert np.array_equal(np.concatenate([rank.read("head") for rank in ranks]), whole.read("head"))
    sizes = [rank.config.vocab_size for rank in ranks]
    assert [rank.first_token for rank in ranks] == [sizes[0] * rank for rank in range(world_size)]


@few
@networks
def test_blocks_are_cut_like_numbers(groups: int, queries: int, units: int, world_size: int) -> None:
    whole = RandomWeights(network(groups, queries, units // 32 * 32 + 32))
    for rank in shards(whole, world_size):
        for name in ("embed_tokens", "layers.0.qkv", "layers.0.output", "layers.0.gate_up", "layers.0.down"):
            blocks = rank.read_blocks(name)
            assert blocks is not None
            assert blocks.kind == rank.block_kind(name)
            assert native.layout(rank, name, "gguf") == (ms.uint8, native.read(rank, name, "gguf").shape)
            numbers = gguf.quants.dequantize(blocks.rows, blocks.kind)
            np.testing.assert_allclose(numbers, rank.read(name), atol=0.03)


def test_blocks_that_would_be_cut_are_not_read() -> None:
    config = NetworkConfig(**{**vars(network(3, 1, 64)), "head_dim": 16})
    shard = Shard(RandomWeights(config), 1, 3)
    assert shard.read_blocks("layers.0.output") is None
    assert shard.block_kind("layers.0.output") is None


def test_a_vocabulary_is_not_shared_by_more_ranks_than_it_fills() -> None:
    with pytest.raises(CheckpointError, match="random: 77 tokens are too few for 40 ranks"):
        shards(RandomWeights(network(2, 2, 64)), 40)


@pytest.mark.parametrize(
    ("groups", "queries", "units", "world_size", "lines"),
    [
        (8, 4, 512, 4, []),
        (
            4,
            7,
            18944,
            8,
            [
                "8 key/value heads in the caches of 8 ranks for 4, 100 % more cache for the same tokens",
                "32 query heads for 28, 14 % more weights and work of attention",
            ],
        ),
        (
            3,
            3,
            1536,
            2,
            [
                "4 key/value heads in the caches of 2 ranks for 3, 33 % more cache for the same tokens",
                "12 query heads for 9, 33 % more weights and work of attention",
            ],
        ),
        (4, 1, 100, 2, ["128 MLP units for 100, 28 % more weights and work of the MLP"]),
    ],
)
def test_what_does_not_divide_is_said(groups: int, queries: int, units: int, world_size: int, lines: list[str]) -> None:
    assert cost(network(groups, queries, units), world_size) == lines
