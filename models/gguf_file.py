"""One GGUF file: its metadata, and its tensors as float32, read through a memory map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models.checkpoint_error import CheckpointError
from models.weight_map import Blocks, Floats

BLOCK_KINDS = (
    gguf.GGMLQuantizationType.Q4_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.BF16,
)


class GGUFFile:
    """The tensors of a GGUF file (a ``TensorSource``), and its metadata by key."""

    def __init__(self, path: Path) -> None:
        """Read the header and the metadata; tensors stay in the file.

        Raises:
            CheckpointError: it cannot be read, is no GGUF file, is cut short, or is one part of several.
        """
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path}: is no GGUF file, or is cut short or damaged: {error}") from None
        if reader.byte_order != "I":
            raise CheckpointError(f"{path}: is big-endian; only little-endian GGUF files are supported")
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        parts = self.value("split.count", 1)
        if parts > 1:
            raise CheckpointError(f"{path}: is one of {parts} parts; merge them first with llama-gguf-split --merge")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every metadata key of the file."""
        return tuple(self._fields)

    def value(self, key: str, default: Any = None) -> Any:
        """One metadata value as a Python number, string, bool or list."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, rows first (GGUF writes them last)."""
        return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Floats:
        """One tensor, dequantised to float32, in memory of its own.

        Raises:
            CheckpointError: it is stored in a type that cannot be dequantised.
        """
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {tensor.tensor_type.name}, which cannot be dequantised"
            ) from None
        return np.array(values, dtype=np.float32, order="C")

    def block_kind(self, name: str) -> gguf.GGMLQuantizationType | None:
        """How one tensor is stored, if in one of ``BLOCK_KINDS``."""
        kind = self._tensors[name].tensor_type
        return kind if kind in BLOCK_KINDS else None

    def read_blocks(self, name: str) -> Blocks | None:
        """One tensor as it is stored, if in one of ``BLOCK_KINDS``: rows of bytes in memory of the file."""
        kind, tensor = self.block_kind(name), self._tensors[name]
        if kind is None:
            return None
        return Blocks(kind, tensor.data.view(np.uint8).reshape(self.shapes[name][0], -1))
