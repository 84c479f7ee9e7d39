"""The C++ linear operators, called as MindSpore calls them, against numpy over random shapes and wrong arguments."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_call import NativeLibrary, OperatorError
from operator_reference import EPS, assert_close, many, normal, rms_norm

from kernels import library

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")

sizes = st.integers(1, 70)


@many
@given(tokens=st.integers(1, 110), inputs=sizes, outputs=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_norm_linear(native: NativeLibrary, tokens: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    x, norm, weight, offset = (
        normal(seed, tokens, inputs),
        normal(1, inputs),
        normal(2, outputs, inputs),
        normal(3, outputs),
    )
    arguments = [x, np.append(norm, np.float32(EPS)), weight, *([offset] if bias else [])]
    actual = native.call("NormLinear", arguments, (tokens, outputs))
    assert_close(actual, rms_norm(x, norm) @ weight.T + (offset if bias else 0))


@many
@given(tokens=st.integers(1, 30), inputs=sizes, outputs=sizes, seed=st.integers(0, 99))
def test_norm_gated_linear(native: NativeLibrary, tokens: int, inputs: int, outputs: int, seed: int) -> None:
    x, norm, weight = normal(seed, tokens, inputs), normal(1, inputs), normal(2, 2 * outputs, inputs) * 0.3
    actual = native.call("NormGatedLinear", [x, np.append(norm, np.float32(EPS)), weight], (tokens, outputs))
    gate, up = (rms_norm(x, norm) @ rows.T for rows in (weight[0::2], weight[1::2]))
    assert_close(actual, gate / (1 + np.exp(-gate)) * up)


@many
@given(tokens=st.integers(1, 30), inputs=sizes, outputs=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_residual_linear(native: NativeLibrary, tokens: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    residual, x, weight = normal(seed, tokens, outputs), normal(1, tokens, inputs), normal(2, outputs, inputs)
    offset = normal(3, outputs)
    actual = native.call("ResidualLinear", [residual, x, weight, *([offset] if bias else [])], (tokens, outputs))
    assert_close(actual, residual + x.astype(np.float64) @ weight.T + (offset if bias else 0))


def test_wrong_dtypes_and_shapes_are_named(native: NativeLibrary) -> None:
    x, norm, weight = normal(0, 3, 8), normal(1, 9), normal(2, 5, 8)
    with pytest.raises(OperatorError, match="NormLinear: argument 0 is float64 instead of float32"):
        native.call("NormLinear", [x.astype(np.float64), norm, weight], (3, 5))
    with pytest.raises(OperatorError, match="argument 1 has 8 instead of 9 on axis 0"):
        native.call("NormLinear", [x, norm[:8].copy(), weight], (3, 5))
    with pytest.raises(OperatorError, match="argument 2 has rank 1 instead of 2"):
        native.call("ResidualLinear", [normal(0, 3, 5), x, weight[0]], (3, 5))
    with pytest.raises(OperatorError, match="gate row for every up row"):
        native.call("NormGatedLinear", [x, norm, weight], (3, 2))


def test_operators_take_turns(native: NativeLibrary) -> None:
    """Their memory is of one at a time, so a second thread is told instead of let in."""
    x, weight = normal(1, 400, 1024), normal(2, 2048, 1024)
    arguments = [x, np.append(normal(3, 1024), np.float32(EPS)), weight]
    refused = threading.Event()

    def run_again_and_again() -> None:
        while not refused.is_set():
            with contextlib.suppress(OperatorError):  # the other came first
                native.call("NormLinear", arguments, (400, 2048))

    thread = threading.Thread(target=run_again_and_again)
    thread.start()

    def run_until_refused() -> None:
        while True:
            native.call("NormLinear", [x[:1], arguments[1], weight[:1]], (1, 1))

    with pytest.raises(OperatorError, match="another thread runs an operator"):
        run_until_refused()
    refused.set()
    thread.join()
