"""Calls an operator of the library as MindSpore does, on numpy arrays: what tests and benchmarks need."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from kernels.library import Library

DTYPES = {"uint16": "bfloat16"}  # MindSpore's name of what numpy does not have


class OperatorError(RuntimeError):
    """The operator refused its arguments."""


class Call:
    """One call, ready to be made as often as one likes on the same memory."""

    def __init__(self, library: Library, name: str, arrays: Sequence[NDArray[Any]]) -> None:
        """Prepare a call of operator ``name``.

        Args:
            library: what ``library.build`` made.
            name: of the C function.
            arrays: contiguous inputs, which may be written to, and then the outputs; uint16 stands for bfloat16.
        """
        assert all(array.flags.c_contiguous for array in arrays)
        count = len(arrays)
        names = [DTYPES.get(array.dtype.name, array.dtype.name) for array in arrays]
        shapes = [(ctypes.c_int64 * max(1, array.ndim))(*array.shape) for array in arrays]
        self._library, self._arrays = library, arrays  # kept alive
        self._function = getattr(ctypes.CDLL(str(library.file)), name)
        self._arguments = (
            count,
            (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
            (ctypes.c_int * count)(*(array.ndim for array in arrays)),
            (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
            (ctypes.c_char_p * count)(*(name.encode() for name in names)),
            None,
            None,
        )

    def __call__(self) -> None:
        """Run it.

        Raises:
            OperatorError: it refused its arguments.
        """
        if self._function(*self._arguments):
            raise OperatorError(self._library.last_error())
