"""Decoder layers as one operator: what their parts give one after another, and its arguments checked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_call import NativeLibrary, OperatorError
from operator_reference import EPS, Array, many, normal

from kernels import library
from models import bundle

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

    def weights(self, layer: int) -> list[Array]:
        """The same in the order of a bundle."""
        return [array for part in self.own(layer) for array in part]

    def arguments(self) -> list[Array]:
        """All of them, as DecoderLayers takes them."""
        return [*self.common(), *(bundled(self.weights(layer)) for layer in range(self.layers))]


def bundled(arrays: list[Array]) -> Array:
    """The arrays in one."""
    return bundle.pack([(array.dtype, array.shape) for array in arrays], arrays)


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
    (x, *common), layer = step.common(), bundled(step.weights(0))
    x = x + native.call("AttentionShare", [x, *common, layer], shape)
    x = x + native.call("MLPShare", [x, layer], shape)
    np.testing.assert_allclose(x, native.call("DecoderLayers", step.arguments(), shape), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, np.zeros(HIDDEN, np.float32), "DecoderLayers: argument 0 has rank 1 instead of 2"),
        (1, np.zeros(DIM, np.float32), "argument 1 has rank 1 instead of 2"),
        (2, np.full(3, 999, np.int32), "PagedAttention: slot 999 is beyond the cache"),
        (8, np.zeros(64, np.float32), "argument 8 is float32 instead of uint8"),
        (8, np.zeros((2, 64), np.uint8), "argument 8 has rank 2 instead of 1"),
    ],
)
def test_wrong_arguments_are_named(native: NativeLibrary, index: int, wrong: Array, message: str) -> None:
    arguments = Step(tokens=3, cached=2, biases=0).arguments()
    arguments[index] = wrong
    with pytest.raises(OperatorError, match=message):
        native.call("DecoderLayers", arguments, (3, HIDDEN))


@pytest.mark.parametrize(
    ("weight", "wrong", "message"),
    [
        (1, np.zeros((QKV - 1, HIDDEN), np.float32), "PagedAttention: argument 0 has 63 instead of 64 on axis 1"),
        (1, np.zeros(QKV, np.float32), "NormLinear: argument 2 has rank 1 instead of 2"),
        (2, np.array([0, 1, -4, 2, EPS], np.float32), "the number of heads is wrong"),
        (2, np.array([0, 1, np.nan, 2, EPS], np.float32), "the number of heads is wrong"),
        (2, np.zeros(3, np.float32), "constants are missing"),
        (2, np.zeros(20, np.uint8), "constants are missing"),
        (5, np.zeros((7, HIDDEN), np.float32), "gate row for every up row"),
        (6, np.zeros((HIDDEN, 3), np.float32), "ResidualLinear: argument 2 has 3 instead of 40 on axis 1"),
    ],
)
def test_wrong_weights_are_named(native: NativeLibrary, weight: int, wrong: Array, message: str) -> None:
    step = Step(tokens=3, cached=2, biases=0)
    weights = step.weights(0)
    weights[weight] = wrong
    with pytest.raises(OperatorError, match=message):
        native.call("DecoderLayers", [*step.common(), bundled(weights)], (3, HIDDEN))


@pytest.mark.parametrize("count", [0, 6, 10])
def test_a_layer_with_too_few_or_too_many_weights_is_refused(native: NativeLibrary, count: int) -> None:
    step = Step(tokens=3, cached=2, biases=2)
    weights = bundled([*step.weights(0), np.zeros(1, np.float32)][:count])
    with pytest.raises(OperatorError, match=f"a layer has 7 to 9 weights, argument 8 {count}"):
        native.call("DecoderLayers", [*step.common(), weights], (3, HIDDEN))


@many
@given(data=st.data())
def test_a_broken_bundle_is_refused_or_read_within_its_bounds(native: NativeLibrary, data: st.DataObject) -> None:
    """The sanitizers watch: whatever its table says, nothing is read beside it."""
    step = Step(tokens=2, cached=3, biases=1)
    weights = bundled(step.weights(0))
    words = weights.view(np.int64)[: 1 + 8 * bundle.ENTRY_WORDS]
    for place in data.draw(st.sets(st.integers(0, words.size - 1), min_size=1, max_size=3)):
        near = st.integers(-2, 130).map(lambda by, old=words[place]: int(old) + by)
        words[place] = data.draw(near | st.integers(-(2**63), 2**63 - 1))
    length = data.draw(st.integers(0, weights.size) | st.just(weights.size))
    with contextlib.suppress(OperatorError):
        native.call("DecoderLayers", [*step.common(), weights[:length].copy()], (2, HIDDEN))


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("DecoderLayers", 8, "takes 8 inputs and a bundle for each layer"),
        ("AttentionShare", 8, "9 arguments instead of 10"),
        ("MLPShare", 1, "2 arguments instead of 3"),
    ],
)
def test_too_few_arguments_are_refused(native: NativeLibrary, name: str, count: int, message: str) -> None:
    with pytest.raises(OperatorError, match=f"{name}: {message}"):
        native.call(name, Step(tokens=1, cached=0, biases=0).arguments()[:count], (1, HIDDEN))
