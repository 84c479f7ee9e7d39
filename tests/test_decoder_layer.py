"""A decoder layer as one operator: what its parts give one after another, and its arguments checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_call import NativeLibrary, OperatorError
from operator_reference import EPS, Array, many, normal

from kernels import library

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4
HIDDEN, INTERMEDIATE = 24, 40
QKV = (HEADS + 2 * KV_HEADS) * DIM


@dataclass
class Layer:
    """The inputs of one layer's operator: one row of ``tokens`` new tokens after ``cached`` ones, in blocks 1, 2, …"""

    tokens: int
    cached: int
    biases: int  # 0: none, 1: of qkv, 2: of the output too

    def arguments(self) -> list[Array]:
        width = -(-(self.cached + self.tokens) // BLOCK)
        places = np.arange(self.cached, self.cached + self.tokens, dtype=np.int32)
        cache = (width + 1, BLOCK, KV_HEADS, DIM)
        return [
            normal(0, self.tokens, HIDDEN),
            np.append(normal(1, HIDDEN), np.float32(EPS)),
            normal(2, QKV, HIDDEN) * 0.3,
            normal(3, self.tokens, DIM),
            places + np.int32(BLOCK),
            np.arange(1, width + 1, dtype=np.int32)[None],
            np.array([self.tokens], np.int32),
            np.array([self.cached + self.tokens], np.int32),
            normal(4, *cache),
            normal(5, *cache),
            np.array([0, 1, HEADS, KV_HEADS, EPS], np.float32),
            normal(6, HIDDEN, HEADS * DIM),
            np.append(normal(7, HIDDEN), np.float32(EPS)),
            normal(8, 2 * INTERMEDIATE, HIDDEN) * 0.3,
            normal(9, HIDDEN, INTERMEDIATE),
            *[normal(10, QKV), normal(11, HIDDEN)][: self.biases],
        ]


def in_parts(native: NativeLibrary, arguments: list[Array]) -> Array:
    """The same with one call for each part."""
    x, norm, qkv, cos_sin, *geometry_and_cache, constants, output, mlp_norm, gate_up, down = arguments[:15]
    biases = arguments[15:]
    tokens = len(x)
    projected = native.call("NormLinear", [x, norm, qkv, *biases[:1]], (tokens, QKV))
    attended = native.call(
        "PagedAttention", [projected, cos_sin, *geometry_and_cache, constants], (tokens, HEADS * DIM)
    )
    y = native.call("ResidualLinear", [x, attended, output, *biases[1:]], (tokens, HIDDEN))
    gated = native.call("NormGatedLinear", [y, mlp_norm, gate_up], (tokens, INTERMEDIATE))
    return native.call("ResidualLinear", [y, gated, down], (tokens, HIDDEN))


@many
@given(tokens=st.integers(1, 40), cached=st.integers(0, 30), biases=st.integers(0, 2))
def test_a_layer_is_its_parts(native: NativeLibrary, tokens: int, cached: int, biases: int) -> None:
    whole, apart = (Layer(tokens, cached, biases).arguments() for _ in range(2))
    assert np.array_equal(native.call("DecoderLayer", whole, (tokens, HIDDEN)), in_parts(native, apart))
    assert np.array_equal(whole[8], apart[8])
    assert np.array_equal(whole[9], apart[9])


@many
@given(tokens=st.integers(1, 40), cached=st.integers(0, 30), biases=st.integers(0, 2))
def test_shares_of_one_rank_are_the_layer(native: NativeLibrary, tokens: int, cached: int, biases: int) -> None:
    whole, apart = (Layer(tokens, cached, biases).arguments() for _ in range(2))
    x, mlp, shape = apart[0], apart[12:15], (tokens, HIDDEN)
    x = x + native.call("AttentionShare", [*apart[:12], *apart[15:]], shape)
    x = x + native.call("MLPShare", [x, *mlp], shape)
    np.testing.assert_allclose(x, native.call("DecoderLayer", whole, shape), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, np.zeros(HIDDEN, np.float32), "DecoderLayer: argument 0 must have rank 2"),
        (2, np.zeros((QKV - 1, HIDDEN), np.float32), "PagedAttention: argument 0 has 63 instead of 64 on axis 1"),
        (4, np.full(3, 999, np.int32), "PagedAttention: slot 999 is beyond the cache"),
        (10, np.array([0, 1, -4, 2, EPS], np.float32), "the number of heads is wrong"),
        (10, np.array([0, 1, np.nan, 2, EPS], np.float32), "the number of heads is wrong"),
        (10, np.zeros(3, np.float32), "constants are missing"),
        (13, np.zeros((7, HIDDEN), np.float32), "gate row for every up row"),
        (14, np.zeros((HIDDEN, 3), np.float32), "ResidualLinear: argument 2 has 3 instead of 40 on axis 1"),
    ],
)
def test_wrong_arguments_are_named(native: NativeLibrary, index: int, wrong: Array, message: str) -> None:
    arguments = Layer(tokens=3, cached=2, biases=0).arguments()
    arguments[index] = wrong
    with pytest.raises(OperatorError, match=message):
        native.call("DecoderLayer", arguments, (3, HIDDEN))


def test_too_few_arguments_are_refused(native: NativeLibrary) -> None:
    with pytest.raises(OperatorError, match="takes 15 to 17 inputs"):
        native.call("DecoderLayer", Layer(tokens=1, cached=0, biases=0).arguments()[:14], (1, HIDDEN))


@pytest.mark.parametrize(("name", "inputs"), [("AttentionShare", "12 to 14"), ("MLPShare", "instead of 5")])
def test_a_share_with_too_few_arguments_is_refused(native: NativeLibrary, name: str, inputs: str) -> None:
    with pytest.raises(OperatorError, match=f"{name}: .*{inputs}"):
        native.call(name, Layer(tokens=1, cached=0, biases=0).arguments()[:2], (1, HIDDEN))
