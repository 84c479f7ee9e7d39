"""The tensors of a folder's ``*.safetensors`` files as float32, read through memory maps.

A file is the length of its header (8 bytes, little endian), the header as JSON (by tensor: type, shape and the place of
its bytes) and the bytes. It is read here because numpy has no bfloat16, which most models are stored in.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint_error import CheckpointError
from models.weight_map import Floats

INDEX_FILES = ("model.safetensors.index.json", "param_name_map.json")  # Hugging Face's, MindSpore's
SINGLE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
MAX_HEADER = 100_000_000  # bytes; the format's own limit
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the file's start
    size: int  # bytes


class SafetensorsFolder:
    """The tensors of one folder (a ``TensorSource``)."""

    def __init__(self, folder: Path) -> None:
        """Read the headers; the tensors stay in the files.

        Raises:
            CheckpointError: there are no such files, one is missing, cut short or damaged, or holds a type of number
                that cannot be read.
        """
        self.files = _files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            self._tensors |= _read_header(path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Floats:
        """One tensor as float32, in memory of its own."""
        tensor = self._tensors[name]
        stored = np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.size,))
        return to_float32(stored, tensor.dtype).reshape(tensor.shape)

    def block_kind(self, name: str) -> None:
        """Safetensors files hold numbers, not blocks."""

    def read_blocks(self, name: str) -> None:
        """None, for the same reason."""


def to_float32(stored: np.memmap[Any, np.dtype[np.uint8]], dtype: str) -> Floats:
    """The numbers of a type of ``ITEM_SIZES`` whose bytes these are."""
    if dtype == "BF16":  # the upper half of a float32
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return stored.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _files(folder: Path) -> tuple[Path, ...]:
    for index in (folder / name for name in INDEX_FILES):
        if index.is_file():
            return _indexed_files(index)
    found = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE_FILE in found:
        return (folder / SINGLE_FILE,)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: has {len(found)} safetensors files and no {INDEX_FILES[0]} that says which to read"
        )
    if found:
        return tuple(found)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: holds its weights as {', '.join(pickles[:3])}; PyTorch's pickle files can run any "
            "code when they are opened and are never read; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: has no *.safetensors with its weights")


def _indexed_files(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()), key=str)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is no index of safetensors files: {error}") from None
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}; only safetensors files beside it are read")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: is missing; {index.name} names it")
    return tuple(index.parent / name for name in names)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    total = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, total - 8):
            raise CheckpointError(f"{path}: is no safetensors file, or is cut short")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = [(name, *_entry(entry)) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: has a damaged header: {error}") from None
    tensors = {}
    for name, dtype, shape, start, end in entries:
        if dtype not in ITEM_SIZES:
            raise CheckpointError(f"{path}: {name} is stored as {dtype}; supported: {', '.join(ITEM_SIZES)}")
        if min(start, end, *shape) < 0 or end - start != math.prod(shape) * ITEM_SIZES[dtype]:
            raise CheckpointError(f"{path}: {name} has {end - start} bytes, which is not {list(shape)} of {dtype}")
        if 8 + length + end > total:
            raise CheckpointError(f"{path}: is cut short: {name} ends beyond its end")
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + start, end - start)
    return tensors


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), int(start), int(end)
