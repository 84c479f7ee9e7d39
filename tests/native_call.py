"""An operator of our library as a function of numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import library
from kernels.caller import Call, OperatorError

__all__ = ["NativeLibrary", "OperatorError"]


class NativeLibrary:
    """The built library."""

    def __init__(self) -> None:
        self.own = library.Library(library.build())

    def call(self, name: str, inputs: Sequence[NDArray[Any]], output_shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Run operator ``name``; inputs must be contiguous, and may be written to. An array of uint16 is bfloat16."""
        (output,) = self.call_all(name, inputs, output_shape)
        return output

    def call_all(
        self, name: str, inputs: Sequence[NDArray[Any]], *output_shapes: tuple[int, ...]
    ) -> list[NDArray[np.float32]]:
        """The same for an operator with several outputs."""
        outputs = [np.full(shape, np.nan, dtype=np.float32) for shape in output_shapes]
        Call(self.own, name, [*inputs, *outputs])()
        return outputs
