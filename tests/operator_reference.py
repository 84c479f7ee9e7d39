"""What tests of the C++ operators compare with, in numpy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from hypothesis import settings
from numpy.typing import NDArray

Array = NDArray[Any]
EPS = 1e-5
many = settings(max_examples=int(os.environ.get("OPERATOR_EXAMPLES", "60")), deadline=None)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rms_norm(x: Array, weight: Array) -> Array:
    result: Array = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS) * weight
    return result


def assert_close(actual: Array, expected: Array, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1)
