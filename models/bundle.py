"""Several weights as one input of a C++ operator: what ``kernels/bundle.h`` reads.

A bundle is uint8 ``[bytes]``: a table of int64, then the weights, each from a multiple of 64 bytes on. The table says
how many there are, then of each its dtype, rank, rows, columns and where it begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.weight_map import Bytes

ALIGNMENT = 64
ENTRY_WORDS = 5
DTYPES = (np.dtype(np.float32), np.dtype(np.uint8))  # by their numbers in the table

Layout = tuple[Any, tuple[int, ...]]  # the dtype and shape of an array: a vector or a matrix


def size(layouts: Sequence[Layout]) -> int:
    """How many bytes a bundle of such arrays has."""
    return _begins(layouts)[-1]


def pack(layouts: Sequence[Layout], arrays: Iterable[NDArray[Any]]) -> Bytes:
    """A bundle of arrays that are laid out so; at most one of them is in memory at a time beside it."""
    begins = _begins(layouts)
    packed = np.zeros(begins[-1], np.uint8)
    table = [len(layouts)]
    for (dtype, shape), begin, array in zip(layouts, begins[:-1], arrays, strict=True):
        assert (array.dtype, array.shape) == (dtype, shape), f"{array.dtype} {array.shape}, not {dtype} {shape}"
        table += [DTYPES.index(array.dtype), array.ndim, array.shape[0], array[0].size, begin]
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    packed[: 8 * len(table)] = np.array(table, np.int64).view(np.uint8)
    return packed


def _begins(layouts: Sequence[Layout]) -> list[int]:
    """Where each array begins, then where the bundle ends."""
    end = _aligned(8 * (1 + ENTRY_WORDS * len(layouts)))
    begins = [end]
    for dtype, shape in layouts:
        end += _aligned(np.dtype(dtype).itemsize * int(np.prod(shape)))
        begins.append(end)
    return begins


def _aligned(bytes_: int) -> int:
    return -(-bytes_ // ALIGNMENT) * ALIGNMENT
