"""The C++ attention, called as MindSpore calls it, against numpy over random shapes, rows and wrong arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_call import NativeLibrary, OperatorError
from operator_reference import EPS, Array, assert_close, many, normal, rms_norm

from kernels import library
from kernels.caller import DTYPES

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")

ROUNDING = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3, "int8": 4e-3}  # of a number in the cache


def encoded(x: Array, dtype: str) -> Array:
    """Numbers ``[..., D]`` as a cache of ``dtype`` holds them; bfloat16 as uint16."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    if dtype == "int8":
        scale = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float32)
        return np.concatenate([np.rint(x / scale).astype(np.int8), scale.view(np.int8)], axis=-1)
    return x.astype(dtype)


def decoded(cache: Array) -> Array:
    """What ``encoded`` wrote, in f64."""
    if cache.dtype == np.uint16:
        cache = (cache.astype(np.uint32) << 16).view(np.float32)
    elif cache.dtype == np.int8:
        cache = cache[..., :-4] * cache[..., -4:].copy().view(np.float32).astype(np.float64)
    return cache.astype(np.float64)


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
        return self.qkv.shape[0], int(self.constants[2]) * self.cos_sin.shape[1]


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
rows = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=5)  # cached, new


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
        key_cache=encoded(normal(seed + 1, *cache), dtype),
        value_cache=encoded(normal(seed + 2, *cache), dtype),
        constants=np.array(constants, dtype=np.float32),
    )


def rotated(step: Step, x: Array) -> Array:
    """``x [T, heads, D]`` at the tokens' positions."""
    cos, sin = (part[:, None] for part in np.split(step.cos_sin.astype(np.float64), 2, axis=1))
    a, b = np.split(x, 2, axis=2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def prepared(step: Step, shape: Shape) -> tuple[Array, Array, Array]:
    """The tokens' queries, keys and values ``[T, heads, D]`` as attention takes them, in f64."""
    heads = step.qkv.astype(np.float64).reshape(step.qkv.shape[0], shape.heads + 2 * shape.kv_heads, shape.dim)
    q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    if shape.norms:
        q_weight, k_weight = np.split(step.constants[5:], 2)
        q, k = rms_norm(q, q_weight), rms_norm(k, k_weight)
    return rotated(step, q), rotated(step, k), v


def expected_caches(step: Step, shape: Shape) -> list[Array]:
    """Both caches after the step, before what is written is rounded. To be called before the step."""
    _, *fresh = prepared(step, shape)
    caches = [decoded(step.key_cache), decoded(step.value_cache)]
    first = step.key_cache.shape[0] // 2 * shape.block_size
    written = step.slots >= 0
    for cache, new in zip(caches, fresh, strict=True):
        cache.reshape(-1, shape.kv_heads, shape.dim)[first + step.slots[written]] = new[written]
    return caches


def expected_attention(step: Step, shape: Shape, caches: list[Array]) -> Array:
    """The output over caches that hold the step's keys and values, token by token in f64."""
    q, _, _ = prepared(step, shape)
    keys, values = (cache.reshape(-1, shape.kv_heads, shape.dim) for cache in caches)
    first = step.key_cache.shape[0] // 2 * shape.block_size
    out, token = np.zeros_like(q), 0
    for row, new in enumerate(step.query_lens):
        for i in range(new):
            context = np.arange(step.context_lens[row] - new + i + 1)
            blocks = step.tables[row, context // shape.block_size]
            slots = first + blocks * shape.block_size + context % shape.block_size
            for head in range(shape.heads):
                kv_head = head // (shape.heads // shape.kv_heads)
                scores = keys[slots, kv_head] @ q[token, head] / np.sqrt(shape.dim)
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values[slots, kv_head] / weights.sum()
            token += 1
    return out.reshape(step.output_shape)


def run(native: NativeLibrary, step: Step) -> Array:
    return native.call("PagedAttention", step.arguments, step.output_shape)


def check(native: NativeLibrary, step: Step, shape: Shape) -> None:
    """Run the step; see that it wrote what it had to, and attended to what it then found in the cache."""
    dtype = DTYPES.get(step.key_cache.dtype.name, step.key_cache.dtype.name)
    expected = expected_caches(step, shape)
    actual = run(native, step)
    caches = [decoded(step.key_cache), decoded(step.value_cache)]
    for cache, wanted in zip(caches, expected, strict=True):
        assert_close(cache, wanted, ROUNDING[dtype])
    assert_close(actual, expected_attention(step, shape, caches))


@many
@given(shape=shapes, lengths=rows, seed=st.integers(0, 999), dtype=st.sampled_from(list(ROUNDING)))
def test_paged_attention(
    native: NativeLibrary, shape: Shape, lengths: list[tuple[int, int]], seed: int, dtype: str
) -> None:
    check(native, make_step(shape, lengths, seed, dtype), shape)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_long_context_and_a_long_prompt(native: NativeLibrary, dtype: str) -> None:
    shape = Shape(heads=9, kv_heads=3, dim=64, block_size=16, norms=False)
    step = make_step(shape, [(3000, 1), (0, 100), (1100, 45)], 5, dtype)
    check(native, step, shape)


def test_a_prompt_of_full_tiles_and_one_token_more(native: NativeLibrary) -> None:
    shape = Shape(heads=10, kv_heads=2, dim=8, block_size=4, norms=False)  # tiles of 25 tokens
    step = make_step(shape, [(0, 26), (70, 51)], seed=7)
    check(native, step, shape)


def test_padding_is_not_written(native: NativeLibrary) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=True)
    step = make_step(shape, [(5, 2), (0, 3)], seed=1)
    step.slots[:2] = -1
    check(native, step, shape)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("part", [slice(32, 48), slice(48, 64)], ids=["key", "value"])
@pytest.mark.parametrize("lengths", [(5, 1), (0, 7)], ids=["token", "prompt"])
def test_a_number_that_is_none_reaches_the_result(
    native: NativeLibrary, lengths: tuple[int, int], part: slice, dtype: str
) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), [lengths, (3, 2)], 1, dtype)
    step.qkv[0, part] = np.nan
    numbers = np.isfinite(run(native, step)).all(axis=1)
    assert not numbers[: lengths[1]].any()
    assert numbers[lengths[1] :].all()


def test_a_key_that_float16_cannot_hold_reaches_the_result(native: NativeLibrary) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), [(0, 7)], 1, "float16")
    step.qkv[0, 32:48] = 1e6
    assert np.isnan(run(native, step)).any(axis=1).all()


INDICES = ("slots", "tables", "query_lens", "context_lens")


@many
@given(
    lengths=rows,
    field=st.sampled_from(INDICES),
    at=st.integers(0, 1000),
    value=st.one_of(st.integers(-3, 200), st.sampled_from([-(2**31), 2**31 - 1])),
)
def test_wrong_indices_are_refused_or_harmless(
    native: NativeLibrary, lengths: list[tuple[int, int]], field: str, at: int, value: int
) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), lengths, seed=2)
    array = getattr(step, field).reshape(-1)
    if array.size:
        array[at % array.size] = value
    with contextlib.suppress(OperatorError):
        run(native, step)


@pytest.mark.parametrize("field", [field.name for field in fields(Step)])
def test_every_argument_is_checked(native: NativeLibrary, field: str) -> None:
    def refuses(change: Callable[[Array], Array]) -> None:
        step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=True), [(4, 5), (0, 7)], seed=2)
        setattr(step, field, np.ascontiguousarray(change(getattr(step, field))))
        with pytest.raises(OperatorError, match="PagedAttention: "):
            native.call("PagedAttention", step.arguments, (12, 32))

    refuses(lambda a: a[:-1])
    refuses(lambda a: a[..., :-1])
    refuses(lambda a: a[None])
    refuses(lambda a: a.astype(np.float64))
    refuses(lambda a: a[:0])


WRONG: dict[str, tuple[str, Any]] = {
    "block 99 of": ("tables", lambda a: a.fill(99)),
    "block -1 of": ("tables", lambda a: a.fill(-1)),
    "is beyond the cache": ("slots", lambda a: a.fill(10_000)),
    "does not fit its block table": ("context_lens", lambda a: a.fill(500)),
    "query lengths add up to": ("query_lens", lambda a: a.fill(2)),
    "query length 5 of a context of 3": ("context_lens", lambda a: a.fill(3)),
    "layer or cache size is wrong": ("constants", lambda a: a.__setitem__(0, 7)),
    "not a multiple": ("constants", lambda a: a.__setitem__(2, 3)),
    "constants are not counts": ("constants", lambda a: a.__setitem__(0, np.nan)),
}


@pytest.mark.parametrize("message", WRONG)
def test_attention_refuses_what_it_would_read_beyond(native: NativeLibrary, message: str) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), [(4, 5)], seed=2)
    field, change = WRONG[message]
    change(getattr(step, field))
    with pytest.raises(OperatorError, match=message):
        run(native, step)


def test_a_row_has_the_same_bits_whatever_is_beside_it_and_however_many_threads_there_are() -> None:
    shape = Shape(heads=6, kv_heads=2, dim=32, block_size=16, norms=False)
    native = NativeLibrary()
    lengths = [(2500, 1), (0, 150), (1500, 40), (130, 1)]
    step = make_step(shape, lengths, seed=3)
    native.own.set_threads(1)
    alone = run(native, step)
    native.own.set_threads(4)
    np.testing.assert_array_equal(run(native, step), alone)
    first = 0
    for row, (_, new) in enumerate(lengths):
        tokens = slice(first, first + new)
        one = Step(
            qkv=step.qkv[tokens].copy(),
            cos_sin=step.cos_sin[tokens].copy(),
            slots=step.slots[tokens].copy(),
            tables=step.tables[row : row + 1].copy(),
            query_lens=step.query_lens[row : row + 1].copy(),
            context_lens=step.context_lens[row : row + 1].copy(),
            key_cache=step.key_cache,
            value_cache=step.value_cache,
            constants=step.constants,
        )
        np.testing.assert_array_equal(run(native, one), alone[tokens])
        first += new


@pytest.mark.parametrize("dtype", ["float64", "int16"])
def test_other_caches_are_refused(native: NativeLibrary, dtype: str) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), [(4, 5)], seed=2)
    step.key_cache, step.value_cache = step.key_cache.astype(dtype), step.value_cache.astype(dtype)
    with pytest.raises(OperatorError, match="the caches must both be float32, float16, bfloat16 or int8"):
        run(native, step)


def test_a_cache_of_another_width_is_refused(native: NativeLibrary) -> None:
    step = make_step(Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False), [(4, 5)], 2, "int8")
    step.key_cache, step.value_cache = (cache[..., :8].copy() for cache in (step.key_cache, step.value_cache))
    with pytest.raises(OperatorError, match="argument 6 has 8 instead of 12 on axis 3"):
        run(native, step)


def test_keys_and_values_of_zeros_have_a_scale_of_zero(native: NativeLibrary) -> None:
    shape = Shape(heads=2, kv_heads=1, dim=6, block_size=4, norms=False)
    step = make_step(shape, [(3, 4)], 2, "int8")
    step.qkv[:] = 0
    check(native, step, shape)


def test_rows_without_new_tokens_are_skipped(native: NativeLibrary) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=8, block_size=4, norms=False)
    step = make_step(shape, [(5, 2), (9, 0), (0, 1)], seed=4)
    step.tables[1] = 10_000  # of a row that is not read
    check(native, step, shape)
