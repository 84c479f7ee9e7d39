"""What each Ascend operator of ``models.ascend`` is taken to do, in NumPy, under its name and with its arguments.

A network of ``models.ascend``'s Cells on these operators runs on the CPU (in MindSpore's pynative mode) and can be
compared with ``models.portable``; an operator on an NPU can be compared with its mirror. Sums are float32. What a
kernel would do with input that its documentation rules out is unknown, so here it is an error.

Nothing here has been compared with an NPU. ``docs/ascend.md`` lists where each assumption comes from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor
from numpy.typing import DTypeLike, NDArray

from models.ascend import MASKED, PREFILL_MASK, Operators
from models.weight_map import Floats

Ints = NDArray[np.int32]


def mirrored(dtype: DTypeLike, context_length: int) -> Operators:
    """The side of the seam whose Cells are Ascend's and whose operators are these."""
    return Operators(sys.modules[__name__], np.dtype(dtype), context_length)


class RmsNorm:
    """``x / sqrt(mean(x²) + epsilon) * gamma`` over the last axis, and ``1 / sqrt(…)``."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon

    def __call__(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        require(x.dtype == gamma.dtype, f"RmsNorm: x is {x.dtype}, gamma {gamma.dtype}")
        numbers = floats(x)
        scale = 1 / np.sqrt(np.mean(numbers**2, -1, keepdims=True) + np.float32(self._epsilon))
        return like(x, numbers * scale * floats(gamma)), Tensor(scale)


class ApplyRotaryPosEmb:
    """Queries ``[T, H * D]`` and keys ``[T, K * D]`` with number i of a head turned with number i + D / 2.

    In format 2, ``cos`` and ``sin`` have the row ``[D]`` of each token, so the last argument is not needed.
    """

    def __init__(self, cos_format: int) -> None:
        require(cos_format == 2, f"ApplyRotaryPosEmb: format {cos_format}; used and mirrored is 2")

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        require(cos.shape == sin.shape and cos.shape[0] == query.shape[0], "ApplyRotaryPosEmb: no row for each token")
        return self._turn(query, floats(cos), floats(sin)), self._turn(key, floats(cos), floats(sin))

    def _turn(self, x: Tensor, cos: Floats, sin: Floats) -> Tensor:
        heads = floats(x).reshape(len(cos), -1, cos.shape[1])  # [T, heads, D]
        first, second = np.split(heads, 2, axis=2)
        partner = np.concatenate((-second, first), 2)
        return like(x, (heads * cos[:, None] + partner * sin[:, None]).reshape(x.shape))


class ReshapeAndCache:
    """Writes keys and values ``[T, K * D]`` to the slots ``[T]`` of caches ``[num_blocks, B, K, D]``, in place.

    Slot s is token s % B of block s // B; negative slots are not written.
    """

    def __call__(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
        places = integers(slots)
        blocks, size, heads, width = key_cache.shape
        require(len(places) == key.shape[0], "ReshapeAndCache: no slot for each token")
        require(bool((places < blocks * size).all()), "ReshapeAndCache: a slot is beyond the cache")
        kept = places >= 0
        for new, cache in ((key, key_cache), (value, value_cache)):
            require(new.dtype == cache.dtype, f"ReshapeAndCache: {new.dtype} into a cache of {cache.dtype}")
            by_slot = cache.asnumpy().reshape(blocks * size, heads, width)  # the cache's own memory
            by_slot[places[kept]] = new.asnumpy().reshape(-1, heads, width)[kept]
        return key


class FlashAttentionScore:
    """Attention of rows that follow each other in ``[T, H * D]`` (layout TH), each token over its row up to itself.

    ``actual_seq_qlen`` and ``actual_seq_kvlen`` are the rows' lengths, one for each row and not summed up; the mask is
    a triangle of 128 x 128 that holds for rows of any length. The result is the last of four.
    """

    def __init__(self, head_num: int, scale_value: float, pre_tokens: int, next_tokens: int, input_layout: str) -> None:
        require(input_layout == "TH", f"FlashAttentionScore: layout {input_layout}; used and mirrored is TH")
        self._heads, self._scale = head_num, scale_value

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real_shift: None,
        drop_mask: None,
        padding_mask: None,
        attn_mask: Tensor,
        prefix: None,
        actual_seq_qlen: Tensor,
        actual_seq_kvlen: Tensor,
    ) -> tuple[None, None, None, Tensor]:
        lengths = integers(actual_seq_qlen)
        require(np.array_equal(lengths, integers(actual_seq_kvlen)), "FlashAttentionScore: rows with cached tokens")
        require(lengths.sum() == query.shape[0], "FlashAttentionScore: lengths do not add up to the tokens")
        triangle = np.triu(np.ones((PREFILL_MASK, PREFILL_MASK), bool), 1)
        require(np.array_equal(floats(attn_mask) != 0, triangle), "FlashAttentionScore: the mask is not the triangle")
        q = floats(query).reshape(len(query), self._heads, -1)
        k, v = (floats(x).reshape(len(query), -1, q.shape[2]) for x in (key, value))
        out = np.empty_like(q)
        for row in rows_of(lengths):
            later = np.triu(np.full((row.stop - row.start,) * 2, MASKED, np.float32), 1)
            out[row] = attend(q[row], k[row], v[row], self._scale, later)
        return None, None, None, like(query, out.reshape(query.shape))


class PagedAttention:
    """Attention over the cache: token t of row r over the first ``context_lens[r]`` tokens of the row's blocks.

    The rows' own tokens are in the cache already. Without ``q_seq_lens`` each row has one token; with them it has that
    many, and ``attn_mask`` ``[T, at least the longest context]`` is added to the scores.
    """

    def __init__(self, head_num: int, scale_value: float, kv_head_num: int) -> None:
        self._heads, self._scale, self._kv_heads = head_num, scale_value, kv_head_num

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        antiquant_scale: None = None,
        antiquant_offset: None = None,
        attn_mask: Tensor | None = None,
        q_seq_lens: Tensor | None = None,
    ) -> Tensor:
        tables, contexts = integers(block_tables), integers(context_lens)
        lengths = np.ones(len(tables), np.int32) if q_seq_lens is None else integers(q_seq_lens)
        require(len(tables) == len(contexts) == len(lengths), "PagedAttention: rows of different numbers")
        require(lengths.sum() == query.shape[0], "PagedAttention: lengths do not add up to the tokens")
        require((attn_mask is None) == (q_seq_lens is None), "PagedAttention: a mask and no lengths, or the reverse")
        blocks, size, heads, _ = key_cache.shape
        require(heads == self._kv_heads, f"PagedAttention: {heads} heads in the cache, not {self._kv_heads}")
        require(bool((contexts <= tables.shape[1] * size).all()), "PagedAttention: a context is beyond its blocks")
        q = floats(query).reshape(query.shape[0], self._heads, -1)
        out = np.empty_like(q)
        for r, row in enumerate(rows_of(lengths)):
            used = tables[r, : -(-int(contexts[r]) // size)]
            require(bool(((used >= 0) & (used < blocks)).all()), "PagedAttention: a block is beyond the cache")
            k, v = (self._cached(cache, used, int(contexts[r])) for cache in (key_cache, value_cache))
            mask = 0.0 if attn_mask is None else floats(attn_mask)[row, : contexts[r]]
            out[row] = attend(q[row], k, v, self._scale, mask)
        return like(query, out.reshape(query.shape))

    def _cached(self, cache: Tensor, used: Ints, length: int) -> Floats:
        """A row's cached tokens, ``[length, K, D]``."""
        tokens: Floats = cache.asnumpy()[used].astype(np.float32).reshape(-1, *cache.shape[2:])[:length]
        return tokens


class Swiglu:
    """``silu(first half) * second half`` of the last axis."""

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        gate, up = np.split(floats(x), 2, axis=dim)
        return like(x, gate / (1 + np.exp(-gate)) * up)


def attend(q: Floats, k: Floats, v: Floats, scale: float, mask: Floats | float) -> Floats:
    """Queries ``[Q, H, D]`` over keys and values ``[S, K, D]`` with a mask ``[Q, S]`` that is added: ``[Q, H, D]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("qhd,shd->hqs", q, k) * np.float32(scale) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Floats = np.einsum("hqs,shd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return out


def rows_of(lengths: Ints) -> Iterator[slice]:
    """Where each row's tokens stand among all."""
    ends = np.cumsum(lengths)
    return (slice(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True))


def floats(x: Tensor) -> Floats:
    """A tensor's numbers in float32."""
    numbers: Floats = x.asnumpy().astype(np.float32)
    return numbers


def integers(x: Tensor) -> Ints:
    """A list of int32.

    Raises:
        ValueError: it is of another type.
    """
    numbers: Ints = x.asnumpy()
    require(numbers.dtype == np.int32, f"{numbers.dtype} where Ascend's operators take int32")
    return numbers


def like(x: Tensor, numbers: NDArray[Any]) -> Tensor:
    """Numbers as a tensor of the dtype of ``x``."""
    return Tensor.from_numpy(np.ascontiguousarray(numbers.astype(x.asnumpy().dtype)))


def require(condition: bool, problem: str) -> None:
    """Refuse what the operator's documentation rules out.

    Raises:
        ValueError: with that problem.
    """
    if not condition:
        raise ValueError(problem)
