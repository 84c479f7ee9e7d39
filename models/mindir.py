"""MindIR files as data: their contract, their weights, their links to our library. Nothing here runs a graph.

The graphs that we export are small files on one common weights file (``WeightsFile``), free of the absolute paths that
MindSpore gives C++ operators (``link``); ``attach`` gives a loader's copy the path of this machine's library again, and
only of ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from mindspore.train.mind_ir_pb2 import ModelProto, TensorProto

from config.manifest import GraphTensor

WEIGHTS_FILE = "weights.bin"  # beside the graphs
LIBRARY = "libnative.so"  # what a C++ operator's path says in the files at rest
HEADER_BYTES = 64  # before the first weight: MindSpore's mark of the byte order
ALIGNMENT = 64  # of each weight in the file


class MindIRError(ValueError):
    """The file is not a MindIR that we can use; the message names it and says why."""


class WeightsFile:
    """The file that has the weights of all graphs of a rank; a weight that several have is written once."""

    def __init__(self, file: BinaryIO) -> None:
        """Write the header to ``file``, which is empty and stays open until the last ``put``."""
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}  # name → offset, length
        self._end = HEADER_BYTES
        file.write(b"\x01".ljust(HEADER_BYTES, b"\0"))  # little endian

    def put(self, parameter: TensorProto, read: Callable[[str], bytes]) -> None:
        """Let a graph find a weight here; ``read`` gives the bytes of that name if none has put it here before."""
        name = plain_name(parameter.name)
        if name not in self._places:
            data = read(name)
            padding = -len(data) % ALIGNMENT
            self._file.write(data)
            self._file.write(bytes(padding))
            self._places[name] = (self._end, len(data))
            self._end += len(data) + padding
        external = parameter.external_data
        external.location = os.path.basename(self._file.name)
        external.offset, external.length = self._places[name]


def read_external(parameter: TensorProto, folder: Path) -> bytes:
    """A weight's bytes from the file that its graph names."""
    external = parameter.external_data
    with (folder / external.location).open("rb") as file:
        file.seek(external.offset)
        data: bytes = file.read(external.length)
    return data


def read(path: Path) -> ModelProto:
    """Parse one MindIR file.

    Raises:
        MindIRError: it is none.
    """
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise MindIRError(f"{path}: is not a MindIR file: {error}") from None
    if not model.HasField("graph"):
        raise MindIRError(f"{path}: holds no graph")
    return model


def attach(source: Path, target: Path, library: Path | None) -> None:
    """Write a copy of the graph ``source`` to ``target`` whose C++ operators are those of ``library``.

    Raises:
        MindIRError: the graph has operators of another library (a library is code: only ours is loaded), or has ours
            and there is none.
    """
    model = read(source)
    operators = custom_operators(model)
    foreign = sorted(name for name in operators if not name.startswith(f"{LIBRARY}:"))
    if foreign:
        raise MindIRError(f"{source}: has operators of a library that is not ours: {', '.join(foreign)}")
    if operators and library is None:
        raise MindIRError(
            f"{source}: was exported with C++ operators, and they are not built here; "
            "run python -m kernels.library, or export the model again with --operators portable"
        )
    link(model, str(library))
    target.write_bytes(model.SerializeToString())


def link(model: ModelProto, library: str) -> None:
    """Let every C++ operator come from ``library``."""
    for primitive in model.primitives:
        for attribute in primitive.attribute:
            if primitive.op_type == "Custom" and attribute.name in ("func_name", "uniq_name"):
                operator = attribute.s.decode().rpartition(":")[2]
                prefix = "Custom_" if attribute.name == "uniq_name" else ""
                attribute.s = f"{prefix}{library}:{operator}".encode()


def custom_operators(model: ModelProto) -> set[str]:
    """``library:function`` of every operator that is not MindSpore's own."""
    return {
        attribute.s.decode()
        for primitive in model.primitives
        for attribute in primitive.attribute
        if primitive.op_type == "Custom" and attribute.name == "func_name"
    }


def inputs(model: ModelProto) -> tuple[GraphTensor, ...]:
    """The graph's inputs in feed order."""
    return tuple(tensor(entry.name, entry.tensor[0]) for entry in model.graph.input)


def tensor(name: str, proto: TensorProto) -> GraphTensor:
    """The name, type and shape of an input or a weight."""
    dtype = TensorProto.DataType.Name(proto.data_type).lower()
    return GraphTensor(name=plain_name(name), dtype={"float": "float32"}.get(dtype, dtype), shape=tuple(proto.dims))


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, copied only where the file system cannot link."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def name_inputs(model: ModelProto, names: Sequence[str]) -> None:
    """Give the graph's inputs these names, in feed order: MindSpore calls some as it likes."""
    new = dict(zip((entry.name for entry in model.graph.input), names, strict=True))
    for entry in model.graph.input:
        entry.name = new[entry.name]
        for tensor in entry.tensor:
            tensor.name = entry.name
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            node.input[:] = [new.get(name, name) for name in node.input]


def plain_name(name: str) -> str:
    """A name without the graph that MindSpore puts before it."""
    return name.rpartition(":")[2]
