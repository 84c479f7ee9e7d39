"""Decoder layers as one operator: what their parts give one after another, and its arguments checked."""

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
class Step:
    """The inputs of layers in one operator. One row of ``tokens`` new tokens after ``cached`` ones, in blocks 1 …"""

    tokens: int
    cached: int
    biases: int  # of a layer. 0: none, 1: of qkv, 2: of the output too
    layers: int = 1

    def common(self) -> list[Array]:
        """The tokens, then what all layers have in common: geometry and cache."""
        width = -(-(self.cached + self.tokens) // BLOCK)
        places = np.arange(self.cached, self.cached + self.tokens, dtype=np.int32)
        cache = (self.layers * (width + 1), BLOCK, KV_HEADS, DIM)
        return [
            normal(0, self.tokens, HIDDEN),
            normal(1, self.tokens, DIM),
            places + np.int32(BLOCK),
            np.arange(1, width + 1, dtype=np.int32)[None],
            np.array([self.tokens], np.int32),
            np.array([self.cached + self.tokens], np.int32),
            normal(2, *cache),
            normal(3, *cache),
        ]

    def own(self, layer: int) -> tuple[list[Array], list[Array], list[Array]]:
        """One layer's inputs: of its attention, of its MLP, and its biases."""
        seed = 10 * (layer + 1)
        attention = [
            np.append(normal(seed, HIDDEN), np.float32(EPS)),
            normal(seed + 1, QKV, HIDDEN) * 0.3,
            np.array([layer, self.layers, HEADS, KV_HEADS, EPS], np.float32),
            normal(seed + 2, HIDDEN, HEADS * DIM),
        ]
        mlp = [
            np.append(normal(seed + 3, HIDDEN), np.float32(EPS)),
            normal(seed + 4, 2 * INTERMEDIATE, HIDDEN) * 0.3,
            normal(seed + 5, HIDDEN, INTERMEDIATE),
        ]
        return attention, mlp, [normal(seed + 6, QKV), normal(seed + 7, HIDDEN)][: self.biases]

    def arguments(self) -> list[Array]:
        """All of them, as DecoderLayers takes them."""
        own = [array for layer in range(self.layers) for part in self.own(layer) for array in part]
        return [*self.common(), np.array([self.layers], np.int32), *own]


def in_parts(native: NativeLibrary, step: Step, x: Array, common: list[Array], layer: int) -> Array:
    """One layer with one call for each part."""
    (norm, qkv, constants, output), (mlp_norm, gate_up, down), biases = step.own(layer)
    projected = native.call("NormLinear", [x, norm, qkv, *biases[:1]], (step.tokens, QKV))
    attended = native.call("PagedAttention", [projected, *common, constants], (step.tokens, HEADS * DIM))
    y = native.call("ResidualLinear", [x, attended, output, *biases[1:]], (step.tokens, HIDDEN))
    gated = native.call("NormGatedLinear", [y, mlp_norm, gate_up], (step.tokens, INTERMEDIATE))
    return native.call("ResidualLinear", [y, gated, down], (step.tokens, HIDDEN))


@many
@given(tokens=st.integers(1, 40), cached=st.integers(0, 30), biases=st.integers(0, 2), layers=st.integers(1, 4))
def test_layers_are_their_parts(native: NativeLibrary, tokens: int, cached: int, biases: int, layers: int) -> None:
    step = Step(tokens, cached, biases, layers)
    whole, (x, *common) = step.arguments(), step.common()
    for layer in range(layers):
        x = in_parts(native, step, x, common, layer)
    assert np.array_equal(native.call("DecoderLayers", whole, (tokens, HIDDEN)), x)
    for written, apart in zip(whole[6:8], common[-2:], strict=True):
        assert np.array_equal(written, apart)


@many
@given(tokens=st.integers(1, 40), cached=st.integers(0, 30), biases=st.integers(0, 2))
def test_shares_of_one_rank_are_the_layer(native: NativeLibrary, tokens: int, cached: int, biases: int) -> None:
    step, shape = Step(tokens, cached, biases), (tokens, HIDDEN)
    (x, *common), (attention, mlp, own_biases) = step.common(), step.own(0)
    x = x + native.call("AttentionShare", [x, *common, *attention, *own_biases], shape)
    x = x + native.call("MLPShare", [x, *mlp], shape)
    np.testing.assert_allclose(x, native.call("DecoderLayers", step.arguments(), shape), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, np.zeros(HIDDEN, np.float32), "DecoderLayers: argument 0 has rank 1 instead of 2"),
        (1, np.zeros(DIM, np.float32), "argument 1 has rank 1 instead of 2"),
        (2, np.full(3, 999, np.int32), "PagedAttention: slot 999 is beyond the cache"),
        (8, np.array([2], np.int32), "7 inputs are not 7 to 9 for each of 2 layers"),
        (8, np.array([-1], np.int32), "7 inputs are not 7 to 9 for each of -1 layers"),
        (8, np.array([1, 1], np.int32), "DecoderLayers: argument 8 has 2 instead of 1 on axis 0"),
        (10, np.zeros((QKV - 1, HIDDEN), np.float32), "PagedAttention: argument 0 has 63 instead of 64 on axis 1"),
        (11, np.array([0, 1, -4, 2, EPS], np.float32), "the number of heads is wrong"),
        (11, np.array([0, 1, np.nan, 2, EPS], np.float32), "the number of heads is wrong"),
        (11, np.zeros(3, np.float32), "constants are missing"),
        (14, np.zeros((7, HIDDEN), np.float32), "gate row for every up row"),
        (15, np.zeros((HIDDEN, 3), np.float32), "ResidualLinear: argument 2 has 3 instead of 40 on axis 1"),
    ],
)
def test_wrong_arguments_are_named(native: NativeLibrary, index: int, wrong: Array, message: str) -> None:
    arguments = Step(tokens=3, cached=2, biases=0).arguments()
    arguments[index] = wrong
    with pytest.raises(OperatorError, match=message):
        native.call("DecoderLayers", arguments, (3, HIDDEN))


@pytest.mark.parametrize(
    ("count", "message"), [(9, "0 inputs are not 7 to 9"), (15, "6 inputs are not 7 to 9"), (8, "takes 9 inputs")]
)
def test_too_few_arguments_are_refused(native: NativeLibrary, count: int, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        native.call("DecoderLayers", Step(tokens=1, cached=0, biases=0).arguments()[:count], (1, HIDDEN))


@pytest.mark.parametrize(("name", "inputs"), [("AttentionShare", "12 to 14"), ("MLPShare", "instead of 5")])
def test_a_share_with_too_few_arguments_is_refused(native: NativeLibrary, name: str, inputs: str) -> None:
    with pytest.raises(OperatorError, match=f"{name}: .*{inputs}"):
        native.call(name, Step(tokens=1, cached=0, biases=0).arguments()[:2], (1, HIDDEN))
