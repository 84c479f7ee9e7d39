"""Packed weights: made from numbers or from GGUF's blocks, read by the C++ operators, against numpy."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_call import NativeLibrary, OperatorError
from operator_reference import EPS, Array, many, normal, rms_norm

from kernels import library
from models.weight_format import panels, quantised

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")

Kind = gguf.GGMLQuantizationType
KINDS = (Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1)
RUN, FINE_RUNS = 64, 8  # the head's, as in linear.cc


def packed(kind: Kind, value: Array) -> tuple[Array, Array]:
    """A weight as the operators read it, and the numbers that it stands for."""
    blocks = quantised(value, kind)
    numbers = gguf.quants.dequantize(blocks.rows, kind)
    return panels(blocks, value.shape[1]), numbers.reshape(value.shape)


def rounded(kind: Kind, x: Array) -> Array:
    """Tokens as the operators round them where the CPU multiplies bytes or bfloat16 numbers."""
    if kind == Kind.BF16:
        return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).reshape(x.shape)
    blocks = x.reshape(*x.shape[:-1], -1, 32).astype(np.float32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / np.where(largest > 0, largest, 1)))
    return (codes * (largest / np.float32(127))).reshape(x.shape)


def assert_product(actual: Array, kind: Kind, x: Array, weight: Array, finish: Any) -> None:
    """``actual`` is ``finish(x @ weight.T)`` with tokens as they are or rounded, whichever this CPU does.

    A number between two codes may be rounded either way, so a few results may lie in between.
    """
    exact, coarse = (
        finish(tokens.astype(np.float64) @ weight.T.astype(np.float64)) for tokens in (x, rounded(kind, x))
    )
    assert actual.shape == exact.shape
    scale = np.abs(exact).max(initial=1)
    errors = [np.abs(actual - expected) / scale for expected in (exact, coarse)]
    assert min(np.median(error) for error in errors) < 1e-5
    assert min(error.max() for error in errors) < 2e-2


sizes = st.builds(lambda blocks: 32 * blocks, st.integers(1, 5))
rows = st.integers(1, 90)
tokens = st.integers(1, 110)
kinds = st.sampled_from(KINDS)


@many
@given(kind=kinds, tokens=tokens, columns=sizes, rows=rows, bias=st.booleans(), seed=st.integers(0, 99))
def test_norm_linear(
    native: NativeLibrary, kind: Kind, tokens: int, columns: int, rows: int, bias: bool, seed: int
) -> None:
    x, norm, offset = normal(seed, tokens, columns), normal(1, columns), normal(2, rows)
    weight, numbers = packed(kind, normal(3, rows, columns))
    arguments = [x, np.append(norm, np.float32(EPS)), weight, *([offset] if bias else [])]
    actual = native.call("NormLinear", arguments, (tokens, rows))
    normed = rms_norm(x, norm).astype(np.float32)
    assert_product(actual, kind, normed, numbers, lambda dots: dots + (offset if bias else 0))


@many
@given(kind=kinds, tokens=tokens, columns=sizes, rows=rows, bias=st.booleans(), seed=st.integers(0, 99))
def test_residual_linear(
    native: NativeLibrary, kind: Kind, tokens: int, columns: int, rows: int, bias: bool, seed: int
) -> None:
    x, residual, offset = normal(seed, tokens, columns), normal(1, tokens, rows), normal(2, rows)
    weight, numbers = packed(kind, normal(3, rows, columns))
    actual = native.call("ResidualLinear", [residual, x, weight, *([offset] if bias else [])], (tokens, rows))
    assert_product(actual, kind, x, numbers, lambda dots: dots + residual + (offset if bias else 0))


@many
@given(kind=kinds, tokens=tokens, columns=sizes, rows=rows, seed=st.integers(0, 99))
def test_norm_gated_linear(native: NativeLibrary, kind: Kind, tokens: int, columns: int, rows: int, seed: int) -> None:
    x, norm = normal(seed, tokens, columns), normal(1, columns)
    weight, numbers = packed(kind, normal(3, 2 * rows, columns) * 0.3)
    actual = native.call("NormGatedLinear", [x, np.append(norm, np.float32(EPS)), weight], (tokens, rows))
    normed = rms_norm(x, norm).astype(np.float32)

    def gated(dots: Array) -> Array:
        gate, up = dots[:, 0::2], dots[:, 1::2]
        result: Array = gate / (1 + np.exp(-gate)) * up
        return result

    assert_product(actual, kind, normed, numbers, gated)


@many
@given(kind=kinds, tokens=st.integers(1, 40), columns=sizes, rows=st.integers(1, 800), seed=st.integers(0, 99))
def test_head_and_the_largest_of_each_run(
    native: NativeLibrary, kind: Kind, tokens: int, columns: int, rows: int, seed: int
) -> None:
    x, norm = normal(seed, tokens, columns), normal(1, columns)
    weight, numbers = packed(kind, normal(3, rows, columns))
    wanted = np.random.default_rng(seed).integers(0, tokens, tokens + 3).astype(np.int32)
    arguments = [x, wanted, np.append(norm, np.float32(EPS)), weight]
    logits, maxima = native.call_all("Head", arguments, (tokens + 3, rows), (tokens + 3, -(-rows // 64)))
    normed = rms_norm(x, norm).astype(np.float32)[wanted]
    if kind == Kind.BF16:
        assert_product(logits, kind, normed, numbers, lambda dots: dots)
    else:
        error = np.abs(logits - normed.astype(np.float64) @ numbers.T)
        step = np.abs(normed).max(axis=1, keepdims=True) / 127  # of a token's codes: numbers are wrong by half at most
        scatter = step * np.abs(numbers).sum(axis=1)
        assert (error <= scatter / 2 + 1e-5).all()
        fine = np.logical_and.reduceat(error <= scatter / 254 + 1e-5, np.arange(0, rows, RUN), axis=1)
        assert (np.count_nonzero(fine, axis=1) >= min(FINE_RUNS, fine.shape[1])).all()
        assert fine[np.arange(tokens + 3), maxima.argmax(axis=1)].all(), "the best logit is not among the fine ones"
    assert np.array_equal(maxima, np.maximum.reduceat(logits, np.arange(0, rows, RUN), axis=1))


@many
@given(kind=st.sampled_from([*KINDS, None]), columns=sizes, rows=rows, seed=st.integers(0, 99))
def test_embedding_gives_the_very_numbers(
    native: NativeLibrary, kind: Kind | None, columns: int, rows: int, seed: int
) -> None:
    value = normal(seed, rows, columns)
    weight, numbers = (value, value) if kind is None else packed(kind, value)
    ids = np.random.default_rng(seed).integers(0, rows, 7).astype(np.int32)
    actual = native.call("Embedding", [ids, weight, np.zeros(columns + 1, np.float32)], (7, columns))
    assert np.array_equal(actual, numbers[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_depend_on_its_neighbours(native: NativeLibrary, kind: Kind) -> None:
    x, norm = normal(1, 150, 96), np.append(normal(2, 96), np.float32(EPS))
    weight, _ = packed(kind, normal(3, 70, 96))
    together = native.call("NormLinear", [x, norm, weight], (150, 70))
    for token in (0, 15, 16, 95, 96, 149):
        alone = native.call("NormLinear", [x[token : token + 1].copy(), norm, weight], (1, 70))
        if kind == Kind.BF16 and native.own.tiles() == library.Tiles.USED:  # tiles add in an order of their own
            assert np.allclose(alone[0], together[token], rtol=1e-5, atol=1e-5)
        else:
            assert np.array_equal(alone[0], together[token])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_reaches_the_result(native: NativeLibrary, kind: Kind, bad: float) -> None:
    x, norm = normal(1, 3, 64), np.append(normal(2, 64), np.float32(EPS))
    x[1, 40] = bad
    weight, _ = packed(kind, normal(3, 80, 64))
    logits, maxima = native.call_all("Head", [x, np.arange(3, dtype=np.int32), norm, weight], (3, 80), (3, 2))
    assert np.isnan(logits[1]).all()
    assert np.isnan(maxima[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_is_zeros(native: NativeLibrary, kind: Kind) -> None:
    weight, _ = packed(kind, normal(3, 40, 64))
    arguments = [np.zeros((2, 40), np.float32), np.zeros((2, 64), np.float32), weight]
    assert not native.call("ResidualLinear", arguments, (2, 40)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_none_passes_the_gate(native: NativeLibrary, kind: Kind) -> None:
    x = normal(1, 2, 64)
    x[1, 40] = np.nan
    weight, _ = packed(kind, normal(3, 40, 64))
    actual = native.call("NormGatedLinear", [x, np.append(normal(2, 64), np.float32(EPS)), weight], (2, 20))
    assert np.isfinite(actual[0]).all()
    assert np.isnan(actual[1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-41])
def test_tiny_numbers_stay_tiny(native: NativeLibrary, kind: Kind, size: float) -> None:
    x = normal(1, 2, 64) * np.float32(size)
    weight, numbers = packed(kind, normal(3, 40, 64))
    actual = native.call("ResidualLinear", [np.zeros((2, 40), np.float32), x, weight], (2, 40))
    assert np.abs(actual).max() <= 1.1 * np.abs(x.astype(np.float64) @ numbers.T.astype(np.float64)).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_number_that_is_none_reaches_a_layer_without_norm(native: NativeLibrary, kind: Kind, bad: float) -> None:
    x = normal(1, 2, 64)
    x[1, 40] = bad
    weight, _ = packed(kind, normal(3, 40, 64))
    actual = native.call("ResidualLinear", [np.zeros((2, 40), np.float32), x, weight], (2, 40))
    assert np.isfinite(actual[0]).all()
    assert not np.isfinite(actual[1]).any()


@pytest.mark.parametrize(
    ("columns", "row_bytes", "message"),
    [
        (48, 51, "inputs in blocks of 32, not 48"),
        (64, 60, "rows of 60 bytes, which is no format of 64 numbers"),
        (64, 0, "rows of 0 bytes"),
        (0, 0, "tokens have no numbers"),
    ],
)
def test_a_weight_of_no_format_is_refused(native: NativeLibrary, columns: int, row_bytes: int, message: str) -> None:
    arguments = [
        np.zeros((2, columns), np.float32),
        np.zeros(columns + 1, np.float32),
        np.zeros((5, row_bytes), np.uint8),
    ]
    with pytest.raises(OperatorError, match=message):
        native.call("NormLinear", arguments, (2, 5))


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_beyond_the_vocabulary_is_refused(native: NativeLibrary, token: int) -> None:
    weight, _ = packed(Kind.Q8_0, normal(3, 5, 32))
    with pytest.raises(OperatorError, match=f"token {token} of 5"):
        native.call("Embedding", [np.array([token], np.int32), weight, np.zeros(33, np.float32)], (1, 32))


@pytest.mark.parametrize("index", [-1, 2])
def test_logits_of_no_token_are_refused(native: NativeLibrary, index: int) -> None:
    weight, _ = packed(Kind.Q8_0, normal(3, 5, 32))
    arguments = [normal(1, 2, 32), np.array([0, index], np.int32), np.zeros(33, np.float32), weight]
    with pytest.raises(OperatorError, match=f"Head: token {index} of 2"):
        native.call_all("Head", arguments, (2, 5), (2, 1))
