"""Call an operator of our library as MindSpore does, on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import library

DTYPES = {"uint16": "bfloat16"}  # which numpy does not have


class OperatorError(RuntimeError):
    """The operator refused its arguments."""


class NativeLibrary:
    """The built library."""

    def __init__(self) -> None:
        self.own = library.Library(library.build())
        self._handle = ctypes.CDLL(str(self.own.file))

    def call(self, name: str, inputs: Sequence[NDArray[Any]], output_shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Run operator ``name``; inputs must be contiguous, and may be written to. An array of uint16 is bfloat16."""
        (output,) = self.call_all(name, inputs, output_shape)
        return output

    def call_all(
        self, name: str, inputs: Sequence[NDArray[Any]], *output_shapes: tuple[int, ...]
    ) -> list[NDArray[np.float32]]:
        """The same for an operator with several outputs."""
        outputs = [np.full(shape, np.nan, dtype=np.float32) for shape in output_shapes]
        arrays = [*inputs, *outputs]
        assert all(array.flags.c_contiguous for array in arrays)
        count = len(arrays)
        shapes = [(ctypes.c_int64 * max(1, array.ndim))(*array.shape) for array in arrays]
        code = getattr(self._handle, name)(
            count,
            (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
            (ctypes.c_int * count)(*(array.ndim for array in arrays)),
            (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
            (ctypes.c_char_p * count)(*(DTYPES.get(array.dtype.name, array.dtype.name).encode() for array in arrays)),
            None,
            None,
        )
        if code:
            raise OperatorError(self.own.last_error())
        return outputs
