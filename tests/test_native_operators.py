"""The C++ operators, called as MindSpore calls them, against numpy over random shapes, rows and wrong arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_call import NativeLibrary, OperatorError
from numpy.typing import NDArray

from kernels import library

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")

Array = NDArray[Any]
EPS = 1e-5


@pytest.fixture(scope="module", params=[1, 3], ids=["1-thread", "3-threads"])
def native(request: pytest.FixtureRequest) -> NativeLibrary:
    opened = NativeLibrary()
    opened.own.set_threads(request.param)
    return opened


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rms_norm(x: Array, weight: Array) -> Array:
    result: Array = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS) * weight
    return result


def assert_close(actual: Array, expected: Array, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1)


sizes = st.integers(1, 70)
many = settings(max_examples=60, deadline=None)


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


@dataclass
class Step:
    """One layer's share of a step over a random cache, and what attention must answer."""

    qkv: Array
    cos_sin: Array
    slots: Array
    tables: Array
    query_lens: Array
    context_lens: Array
    key_cache: Array
    value_cache: Array
    constants: Array

    @property
    def arguments(self) -> list[Array]:
        return list(vars(self).values())

    @property
    def output_shape(self) -> tuple[int, int]:
        return self.qkv.shape[0], int(self.constants[2]) * self.key_cache.shape[3]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    norms: bool


shapes = st.builds(
    lambda groups, kv_heads, half, block_size, norms: Shape(groups * kv_heads, kv_heads, 2 * half, block_size, norms),
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 4, 8, 16, 128]), st.booleans(),
)  # fmt: skip
rows = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=5)  # cached, new


def make_step(shape: Shape, lengths: list[tuple[int, int]], seed: int, dtype: str = "float32") -> Step:
    """Rows of (cached, new) tokens on shuffled blocks of the second of two layers."""
    rng = np.random.default_rng(seed)
    needed = [-(-(cached + new) // shape.block_size) for cached, new in lengths]
    blocks = 1 + rng.permutation(sum(needed) + 2)
    tables = np.zeros((len(lengths), max(needed)), dtype=np.int32)
    slots: list[int] = []
    for row, ((cached, new), count) in enumerate(zip(lengths, needed, strict=True)):
        tables[row, :count], blocks = blocks[:count], blocks[count:]
        positions = np.arange(cached, cached + new)
        slots += list(tables[row, positions // shape.block_size] * shape.block_size + positions % shape.block_size)
    tokens, num_blocks = len(slots), sum(needed) + 3
    cache = (2 * num_blocks, shape.block_size, shape.kv_heads, shape.dim)
    angles = rng.uniform(0, 6, (tokens, shape.dim // 2))
    constants = [1, 2, shape.heads, shape.kv_heads, EPS, *(rng.uniform(0.5, 1.5, 2 * shape.dim) if shape.norms else [])]
    return Step(
        qkv=normal(seed, tokens, (shape.heads + 2 * shape.kv_heads) * shape.dim),
        cos_sin=np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        slots=np.array(slots, dtype=np.int32),
        tables=tables,
        query_lens=np.array([new for _, new in lengths], dtype=np.int32),
        context_lens=np.array([cached + new for cached, new in lengths], dtype=np.int32),
        key_cache=normal(seed + 1, *cache).astype(dtype),
        value_cache=normal(seed + 2, *cache).astype(dtype),
        constants=np.array(constants, dtype=np.float32),
    )


def expected_attention(step: Step, shape: Shape) -> tuple[Array, Array, Array]:
    """The output and both caches afterwards, computed token by token in f64."""
    keys, values = step.key_cache.astype(np.float64), step.value_cache.astype(np.float64)
    first = keys.shape[0] // 2 * shape.block_size
    flat_keys, flat_values = (cache.reshape(-1, shape.kv_heads, shape.dim) for cache in (keys, values))
    tokens = step.qkv.shape[0]
    q, k, v = np.split(
        step.qkv.astype(np.float64).reshape(tokens, -1, shape.dim), [shape.heads, shape.heads + shape.kv_heads], axis=1
    )
    if shape.norms:
        q_weight, k_weight = np.split(step.constants[5:], 2)
        q, k = rms_norm(q, q_weight), rms_norm(k, k_weight)
    cos, sin = (part[:, None] for part in np.split(step.cos_sin.astype(np.float64), 2, axis=1))

    def rotate(x: Array) -> Array:
        a, b = np.split(x, 2, axis=2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    written = step.slots >= 0
    flat_keys[first + step.slots[written]] = rotate(k)[written]
    flat_values[first + step.slots[written]] = v[written]
    q, out, token = rotate(q), np.zeros((tokens, shape.heads, shape.dim)), 0
    for row, new in enumerate(step.query_lens):
        for i in range(new):
            context = np.arange(step.context_lens[row] - new + i + 1)
            slots = (
                first + step.tables[row, context // shape.block_size] * shape.block_size + context % shape.block_size
            )
            for head in range(shape.heads):
                kv_head = head // (shape.heads // shape.kv_heads)
                scores = flat_keys[slots, kv_head] @ q[token, head] / np.sqrt(shape.dim)
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ flat_values[slots, kv_head] / weights.sum()
            token += 1
    return out.reshape(tokens, -1), keys, values


@many
@given(shape=shapes, lengths=rows, seed=st.integers(0, 999), dtype=st.sampled_from(["float32", "float16"]))
def test_paged_attention(
    native: NativeLibrary, shape: Shape, lengths: list[tuple[int, int]], seed: int, dtype: str
) -> None:
    step = make_step(shape, lengths, seed, dtype)
    expected, keys, values = expected_attention(step, shape)
    actual = native.call("PagedAttention", step.arguments, step.output_shape)
    tolerance = 2e-5 if dtype == "float32" else 5e-3
    assert_close(actual, expected, tolerance)
    assert_close(step.key_cache, keys, tolerance)
    assert_close(step.value_cache, values, tolerance)


def test_a_long_context_and_a_long_prompt(native: NativeLibrary) -> None:
    shape = Shape(heads=9, kv_heads=3, dim=64, block_size=16, norms=False)
    step = make_step(shape, [(3000, 1), (0, 300), (700, 130)], seed=5)
    expected, _, _ = expected_attention(step, shape)
    assert_close(native.call("PagedAttention", step.arguments, step.output_shape), expected)


def test_padding_is_not_written(native: NativeLibrary) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=True)
    step = make_step(shape, [(5, 2), (0, 3)], seed=1)
    step.slots[:2] = -1
    expected, keys, values = expected_attention(step, shape)
    actual = native.call("PagedAttention", step.arguments, step.output_shape)
    assert_close(step.key_cache, keys)
    assert_close(step.value_cache, values)
    assert_close(actual[2:], expected[2:])


WRONG: dict[str, tuple[str, Any]] = {
    "block 99 of": ("tables", lambda a: a.fill(99)),
    "block -1 of": ("tables", lambda a: a.fill(-1)),
    "is beyond the cache": ("slots", lambda a: a.fill(10_000)),
    "does not fit its block table": ("context_lens", lambda a: a.fill(500)),
    "query lengths add up to": ("query_lens", lambda a: a.fill(2)),
    "query length 5 of a context of 3": ("context_lens", lambda a: a.fill(3)),
    "layer or cache size is wrong": ("constants", lambda a: a.__setitem__(0, 7)),
    "not a multiple": ("constants", lambda a: a.__setitem__(2, 3)),
}


@pytest.mark.parametrize("message", WRONG)
def test_attention_refuses_what_it_would_read_beyond(native: NativeLibrary, message: str) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), [(4, 5)], seed=2)
    field, change = WRONG[message]
    change(getattr(step, field))
    with pytest.raises(OperatorError, match=message):
        native.call("PagedAttention", step.arguments, step.output_shape)


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
