"""Paged pairs for the stand-in of MindSpore Lite: real MindIR files without a network in them, and folders of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from mind_ir import mind_ir

from agent.arithmetic_model import END, VOCAB_SIZE
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
) -> Path:
    """A folder as ``models.adopt`` makes it of one rank, whose answers are those of the stand-in model."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(STANDIN / name, folder / name)
    for phase, inputs in (("prefill", prefill), ("decode", decode)):
        (folder / phase).mkdir()
        (folder / phase / "rank_0_graph.mindir").write_bytes(graph(inputs, version).SerializeToString())
    standin = read_manifest(STANDIN)
    manifest = msgspec.structs.replace(
        standin,
        name="pair",
        architecture="mindir, paged",
        target="ascend",
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


def write_ranks(folder: Path, ranks: int = 2) -> list[tuple[Path, Path]]:
    """The pairs of a model of several ranks as MindFormers leaves them, each rank with weights of its own beside it."""
    phases = {"mindir_full_checkpoint": PREFILL, "mindir_inc_checkpoint": DECODE}
    for phase, inputs in phases.items():
        for rank in range(ranks):
            variables = folder / phase / f"rank_{rank}_variables"
            variables.mkdir(parents=True)
            (variables / "data_0").write_bytes(rank.to_bytes(4, "little"))
            model = graph(inputs, version=1)
            weight = model.graph.parameter.add(name="graph:weight", data_type=mind_ir.TensorProto.INT32, dims=[1])
            weight.external_data.location = f"rank_{rank}_variables/data_0"
            weight.external_data.length = 4
            model.graph.node.add(op_type="REF::AllReduce:1")
            model.graph.output.add().tensor.add(data_type=mind_ir.TensorProto.FLOAT, dims=[-1, VOCAB_SIZE])
            (folder / phase / f"rank_{rank}_graph.mindir").write_bytes(model.SerializeToString())
    return [
        (folder / "mindir_full_checkpoint" / name, folder / "mindir_inc_checkpoint" / name)
        for name in (f"rank_{rank}_graph.mindir" for rank in range(ranks))
    ]


def write_tokenizer(folder: Path) -> Path:
    """The stand-in's text side as a folder that ``models.adopt`` takes."""
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(STANDIN / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    return folder


def graph(inputs: Inputs, version: int) -> Any:
    """A MindIR that takes these inputs and has a cache inside."""
    model = mind_ir.ModelProto(mind_ir_version=version, producer_name="MindSpore")
    for name, shape in inputs.items():
        entry = model.graph.input.add(name=f"graph:{name}")
        entry.tensor.add(data_type=mind_ir.TensorProto.INT32, dims=shape)
    for name in ("key_cache", "value_cache"):
        model.graph.parameter.add(
            name=f"graph:{name}", data_type=mind_ir.TensorProto.FLOAT16, dims=[NUM_BLOCKS, BLOCK_SIZE, 1, 1]
        )
    return model


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
