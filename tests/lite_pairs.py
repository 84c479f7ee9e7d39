"""Model folders of paged pairs for the stand-in of MindSpore Lite: real MindIR files, without a network in them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec
from mind_ir import mind_ir

from config.manifest import Capabilities, GraphTensor, Manifest, PagedGraph, PagedPair, read_manifest, write_manifest

TESTS = Path(__file__).parent
FAKES = TESTS / "fakes"
STANDIN = TESTS.parent / "config" / "standin"
NUM_BLOCKS, BLOCK_SIZE, CONTEXT = 32, 16, 128
ROLES = {
    "tokens": "token_ids",
    "batch_valid_length": "valid_lengths",
    "block_tables": "block_tables",
    "slot_mapping": "slot_mapping",
}
Inputs = dict[str, list[int]]  # the shape of each, by the name in the file
# Generation C, shapes open: block tables in decode only
PREFILL: Inputs = {"tokens": [-1, -1], "batch_valid_length": [-1], "slot_mapping": [-1]}
DECODE: Inputs = {"tokens": [-1, 1], "batch_valid_length": [-1], "block_tables": [-1, -1], "slot_mapping": [-1]}


def write_pair(
    folder: Path,
    *,
    prefill: Inputs = PREFILL,
    decode: Inputs = DECODE,
    padding_slot: int = 0,
    version: int = 1,
    ranks: int = 1,
) -> Path:
    """A folder as ``models.adopt`` makes it, whose answers are those of the stand-in model."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(STANDIN / name, folder / name)
    for rank in range(ranks):
        place = folder / f"rank_{rank}" if ranks > 1 else folder
        for phase, inputs in (("prefill", prefill), ("decode", decode)):
            (place / phase).mkdir(parents=True)
            (place / phase / "rank_0_graph.mindir").write_bytes(graph(inputs, version))
    standin = read_manifest(STANDIN)
    manifest = msgspec.structs.replace(
        standin,
        name="pair",
        architecture="mindir, paged",
        target="ascend",
        world_size=ranks,
        context_length=CONTEXT,
        block_size=BLOCK_SIZE,
        cache_write="graph",
        capabilities=Capabilities(cached_context=False, mixed_steps=False),
        pair=PagedPair(
            prefill=described("prefill", prefill),
            decode=described("decode", decode),
            num_blocks=NUM_BLOCKS,
            cache_dtype="float16",
            padding_slot=padding_slot,  # type: ignore[arg-type]
        ),
        files=dict(digests(folder)),
    )
    write_manifest(folder, manifest)
    return folder


def described(phase: str, inputs: Inputs) -> PagedGraph:
    """A graph as the manifest has it."""
    tensors = tuple(GraphTensor(ROLES[name], "int32", tuple(shape)) for name, shape in inputs.items())
    return PagedGraph(file=f"{phase}/rank_0_graph.mindir", inputs=tensors, names=tuple(inputs))


def graph(inputs: Inputs, version: int) -> bytes:
    """A MindIR that takes these inputs and has a cache inside."""
    model = mind_ir.ModelProto(mind_ir_version=version, producer_name="MindSpore")
    for name, shape in inputs.items():
        entry = model.graph.input.add(name=f"graph:{name}")
        entry.tensor.add(data_type=mind_ir.TensorProto.INT32, dims=shape)
    for name in ("key_cache", "value_cache"):
        model.graph.parameter.add(
            name=f"graph:{name}", data_type=mind_ir.TensorProto.FLOAT16, dims=[NUM_BLOCKS, BLOCK_SIZE, 1, 1]
        )
    content: bytes = model.SerializeToString()
    return content


def digests(folder: Path) -> Iterable[tuple[str, str]]:
    """Every file with its SHA-256."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()


def replace_manifest(folder: Path, **changes: object) -> Manifest:
    """Change what a folder says of itself."""
    manifest = msgspec.structs.replace(read_manifest(folder), **changes)
    write_manifest(folder, manifest)
    return manifest
