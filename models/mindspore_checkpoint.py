"""The tensors of a folder's ``*.ckpt`` files, as MindSpore saves them, read through memory maps.

A file is one protobuf message (``mindspore/train/checkpoint.proto``) of any size, a run of named values. A tensor is
one value, or several with the same name, each with the next part of the bytes: MindSpore cuts at 512 MB::

    Checkpoint:  1 Value (repeated)
    Value:       1 name, 2 tensor (3: a hash table, which no language model has)
    tensor:      1 dimensions (repeated), 2 type as text, 3 bytes

Protobuf's own parser would need the whole file in memory, so the places of the bytes are found here, by their lengths.
Nothing in such a file is code.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.checkpoint_error import CheckpointError
from models.safetensors_folder import ITEM_SIZES, to_float32
from models.weight_map import Floats

CKPT = ".ckpt"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.ckpt$")
TYPES = {"Float64": "F64", "Float32": "F32", "Float16": "F16", "BFloat16": "BF16"}
CHECKSUM_MARK = b"crc_num"  # before ten bytes of CRC, at the end of a file saved with one
CHECKSUM_BYTES = len(CHECKSUM_MARK) + 10
VARINT, BYTES = 0, 2  # protobuf's wire types that such a file has


@dataclass
class CheckpointTensor:
    """Where one tensor's bytes are."""

    path: Path
    kind: str  # MindSpore's name of the type
    shape: tuple[int, ...]
    spans: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes; in the tensor's order

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return sum(size for _, size in self.spans)


class MindSporeCheckpoint:
    """The tensors of one folder's files (a ``TensorSource``)."""

    def __init__(self, folder: Path) -> None:
        """Find the tensors; their bytes stay in the files.

        Raises:
            CheckpointError: it is not clear which files to read, or one is damaged or holds a type of number that
                cannot be read.
        """
        self._tensors: dict[str, CheckpointTensor] = {}
        for path in _files(folder):
            self._tensors |= _scan(path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Floats:
        """One tensor as float32, in memory of its own."""
        tensor = self._tensors[name]
        values = np.empty(math.prod(tensor.shape), np.float32)
        done = 0
        for offset, size in tensor.spans:
            stored = np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=offset, shape=(size,))
            part = to_float32(stored, TYPES[tensor.kind])
            values[done : done + part.size] = part
            done += part.size
        return values.reshape(tensor.shape)

    def block_kind(self, name: str) -> None:
        """Such files hold numbers, not blocks."""

    def read_blocks(self, name: str) -> None:
        """None, for the same reason."""


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob(f"*{CKPT}"))
    parts = [match for path in found if (match := PART.search(path.name))]
    if len(parts) == len(found) and found:
        expected = int(parts[0][2])
        if [int(part[1]) for part in parts] != list(range(1, expected + 1)):
            raise CheckpointError(f"{folder}: holds {len(found)} of the {expected} parts that its file names speak of")
    elif len(found) != 1:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{folder}: holds {len(found)} checkpoints ({names}); leave the one to serve in it")
    return found


def _scan(path: Path) -> dict[str, CheckpointTensor]:
    """Every tensor of a file by its name, but for the counters of a training."""
    tensors: dict[str, CheckpointTensor] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            marked = data[-CHECKSUM_BYTES:].startswith(CHECKSUM_MARK)
            for _, start, end in _fields(data, 0, len(data) - CHECKSUM_BYTES * marked):
                name, kind, shape, span = _value(data, start, end)
                tensors.setdefault(name, CheckpointTensor(path, kind, shape)).spans.append(span)
    except (ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path}: is no MindSpore checkpoint, or is encrypted, cut short or damaged ({error})"
        ) from None
    floats = {name: tensor for name, tensor in tensors.items() if _is_read(name, tensor)}
    for name, tensor in floats.items():
        item = ITEM_SIZES[TYPES[tensor.kind]]
        if tensor.size != math.prod(tensor.shape) * item or any(size % item for _, size in tensor.spans):
            raise CheckpointError(
                f"{path}: {name} has {tensor.size} bytes, which is not {list(tensor.shape)} of {tensor.kind}"
            )
    return floats


def _is_read(name: str, tensor: CheckpointTensor) -> bool:
    """Whether a tensor can be a weight: whole numbers and texts of at most one dimension are a training's notes."""
    if tensor.kind in TYPES:
        return True
    if len(tensor.shape) > 1:
        raise CheckpointError(f"{tensor.path}: {name} is stored as {tensor.kind}; supported: {', '.join(TYPES)}")
    return False


def _value(data: mmap.mmap, start: int, end: int) -> tuple[str, str, tuple[int, ...], tuple[int, int]]:
    """One value: its tensor's name, type and shape, and where its bytes are."""
    value = {number: (begin, stop) for number, begin, stop in _fields(data, start, end)}
    if 3 in value:
        raise ValueError("it holds a hash table")
    name = data[slice(*value[1])].decode()
    shape: list[int] = []
    tensor = {}
    for number, begin, stop in _fields(data, *value[2]):
        tensor[number] = (begin, stop)
        while number == 1 and begin < stop:  # one dimension, or several packed together
            size, begin = _varint(data, begin, stop)
            shape.append(size)
    begin, stop = tensor[3]
    kind = data[slice(*tensor[2])].decode()
    return name, kind, () if shape == [0] else tuple(shape), (begin, stop - begin)  # MindSpore's scalars have [0]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of the message between two offsets: number, and where its content begins and ends.

    Raises:
        ValueError: it is no message.
    """
    while start < end:
        key, start = _varint(data, start, end)
        if key & 7 == BYTES:
            size, start = _varint(data, start, end)
            stop = start + size
        elif key & 7 == VARINT:
            _, stop = _varint(data, start, end)
        else:
            raise ValueError(f"at byte {start} is no field of it")
        if stop > end:
            raise ValueError(f"a field at byte {start} ends beyond the end")
        yield key >> 3, start, stop
        start = stop


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where the next thing begins."""
    value = shift = 0
    for place in range(start, min(end, start + 10)):
        value |= (data[place] & 0x7F) << shift
        if data[place] < 0x80:
            return value, place + 1
        shift += 7
    raise ValueError(f"the number at byte {start} does not end")
