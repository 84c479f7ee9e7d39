"""``python -m models.contract PREFILL DECODE``: what a pair of MindIR files is, told from the files alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

from config.manifest import GraphTensor
from models import mindir
from models.generations import SERVED, SLOTS, TOKENS, WHAT_IT_IS, Generation, Role, Roles, classify
from models.graph_file import ASCEND_OPERATORS, COLLECTIVES, GONE_OPERATORS, KNOWN_VERSION, GraphFile

Device = Literal["cpu", "ascend"]
Way = Literal["cpu", "ascend", "mindspore_lite"]  # to run a pair: MindSpore on either device, or Lite on Ascend


@dataclass(frozen=True)
class Contract:
    """A prefill and a decode graph, and what they are together."""

    prefill: GraphFile
    decode: GraphFile
    generation: Generation | None  # None: none that is known
    prefill_roles: Roles
    decode_roles: Roles

    @property
    def graphs(self) -> tuple[tuple[str, GraphFile, Roles], ...]:
        """Both, by phase."""
        return ("prefill", self.prefill, self.prefill_roles), ("decode", self.decode, self.decode_roles)

    @property
    def cache(self) -> GraphTensor | None:
        """The first of the caches, which stands for all."""
        return next(iter(self.prefill.caches.values()), None)

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the vocabulary; None if neither graph says."""
        return self.prefill.vocab_size or self.decode.vocab_size

    def sizes(self, phase: str, role: Role) -> tuple[int, ...]:
        """The shape of the input of this role; -1 is dynamic."""
        [(graph, roles)] = [(graph, roles) for name, graph, roles in self.graphs if name == phase]
        return graph.inputs[roles.index(role)].shape


def read_contract(prefill: Path, decode: Path) -> Contract:
    """Read and classify a pair.

    Raises:
        mindir.MindIRError: one of the files is missing, or no MindIR.
    """
    graphs = GraphFile.read(prefill), GraphFile.read(decode)
    generation, ours, theirs = classify(graphs[0].inputs, graphs[1].inputs)
    return Contract(*graphs, generation, ours, theirs)


def mismatches(contract: Contract) -> Iterator[str]:
    """Why the two graphs are not of one model, or a graph not what its inputs say."""
    prefill, decode = contract.prefill, contract.decode
    if prefill.path.samefile(decode.path):
        yield "prefill and decode are one file"
    if contract.vocab_size != (decode.vocab_size or contract.vocab_size):
        yield f"the vocabulary has {prefill.vocab_size} tokens in prefill and {decode.vocab_size} in decode"
    apart = prefill.parameters.keys() ^ decode.parameters.keys() if contract.generation != "own" else set()
    for name in sorted(apart)[:1]:  # our graphs for Ascend have constants of their own
        owner = "prefill" if name in prefill.parameters else "decode"
        yield f"only {owner} has the parameter {name}"
    for name in sorted(prefill.parameters.keys() & decode.parameters.keys()):
        ours, theirs = prefill.parameters[name], decode.parameters[name]
        if ours != theirs:
            yield f"{name} is {shown(ours)} in prefill and {shown(theirs)} in decode"
            break
    if contract.generation in SERVED:
        yield from paged_mismatches(contract)


def paged_mismatches(contract: Contract) -> Iterator[str]:
    """What does not fit together in a paged pair."""
    shapes = {tensor.shape for tensor in contract.prefill.caches.values()}
    if len(contract.prefill.caches) % 2 or not shapes:
        yield f"a cache needs keys and values of every layer, and there are {len(contract.prefill.caches)} of rank 4"
    if len(shapes) > 1:
        yield f"its caches have different shapes: {', '.join(map(str, map(list, sorted(shapes))))}"
    if contract.vocab_size is None:
        yield "neither its outputs nor its parameters say how large the vocabulary is"
    if contract.sizes("decode", TOKENS)[1] not in (1, -1):
        yield f"decode takes {contract.sizes('decode', TOKENS)[1]} tokens of a row, and not one"
    for phase, _, _ in contract.graphs:
        rows, width = contract.sizes(phase, TOKENS)
        if phase == "prefill" and width == 1:
            yield "prefill takes one token of a row, which is what decode does: give prefill first"
        slots = contract.sizes(phase, SLOTS)[0]
        if min(rows, width, slots) > 0 and rows * width != slots:
            yield f"{phase} takes {rows} x {width} tokens and slots for {slots}"


def obstacles(contract: Contract, way: Way) -> Iterator[str]:
    """Why a pair cannot be run in this way by an agent of this project. What stops Lite stops all of them."""
    graphs = contract.prefill, contract.decode
    operators = graphs[0].operators | graphs[1].operators
    if (version := max(graph.version for graph in graphs)) > KNOWN_VERSION:
        yield (
            f"its mind_ir_version is {version}, and the installed MindSpore reads up to {KNOWN_VERSION}: "
            "install the one that wrote it"
        )
    if libraries := sorted({library for graph in graphs for library in graph.libraries}):
        yield f"it has operators of a foreign library, which is code: {', '.join(libraries)}"
    if gone := sorted(operators & GONE_OPERATORS):
        yield f"it uses {', '.join(gone)}, which MindSpore has no more: only MindSpore-Lite of its time runs it"
    if way == "mindspore_lite":
        return
    if collectives := collectives_of(contract):
        yield f"it is one of several ranks (it uses {', '.join(collectives)}), which only MindSpore Lite runs"
    if way == "ascend":
        return
    if fused := sorted(operators & ASCEND_OPERATORS):
        yield f"it uses {', '.join(fused)}: fused operators of Ascend, without a kernel for CPUs"
    if any(tensor.dtype == "bfloat16" for graph in graphs for tensor in graph.parameters.values()):
        yield "it has bfloat16 weights, which MindSpore cannot multiply on a CPU"


def collectives_of(contract: Contract) -> list[str]:
    """The operators by which a pair computes together with those of other ranks."""
    return sorted((contract.prefill.operators | contract.decode.operators) & COLLECTIVES)


def explain(contract: Contract) -> str:
    """One paragraph for a person: what the pair is, whether it is served here, and what to do."""
    return " ".join(f"{sentence}." for sentence in sentences(contract))


def sentences(contract: Contract) -> Iterator[str]:
    """The sentences of ``explain``, without their full stops."""
    prefill = contract.prefill
    if contract.generation is None:
        yield f"{prefill.path} and {contract.decode.path} are no pair of a known kind"
        for phase, graph, _ in contract.graphs:
            yield f"The inputs of {phase} are {', '.join(map(shown, graph.inputs)) or 'none'}"
        yield "Export the checkpoint with python -m models.export, or give the two graphs of one MindFormers export"
        return
    yield f"{prefill.path} and {contract.decode.path} are a pair of {WHAT_IT_IS[contract.generation]}"
    if contract.cache:
        layers, cache = len(prefill.caches) // 2, shown(contract.cache)
        yield f"It has a vocabulary of {contract.vocab_size} and, for {layers} layers, caches like {cache}"
    yield f"It was written by {prefill.producer} in mind_ir_version {prefill.version}"
    if wrong := list(mismatches(contract)):
        yield f"But the two do not belong together: {'; '.join(wrong)}"
        yield "Give prefill and decode of one export"
    elif contract.generation == "own":
        yield "Nothing is to be done: deployments name the folder of the export"
    elif contract.generation not in SERVED:
        reasons = ["this server's requests share a cache of blocks, and this pair has none"]
        yield f"It is not served: {'; '.join([*reasons, *obstacles(contract, 'mindspore_lite')])}"
        yield "Export the checkpoint with python -m models.export"
    else:
        yield from advice(contract)


def advice(contract: Contract) -> Iterator[str]:
    """What can be done with a sound paged pair."""
    if nowhere := list(obstacles(contract, "mindspore_lite")):
        yield f"It is not served: {'; '.join(nowhere)}"
        yield "Export the checkpoint with python -m models.export"
        return
    if collectives := collectives_of(contract):
        yield from advice_for_a_rank(collectives)
        return
    if contract.prefill.version < KNOWN_VERSION:
        yield (
            f"Only version {KNOWN_VERSION} was tried; whether MindSpore still has the operators of this one shows when "
            "an agent starts"
        )
    yield "python -m models.adopt makes a model folder of it"
    if on_cpu := list(obstacles(contract, "cpu")):
        yield f"That runs on Ascend only: {'; '.join(on_cpu)}"
        yield "To serve the model on a CPU, export its checkpoint with python -m models.export"


def advice_for_a_rank(collectives: list[str]) -> Iterator[str]:
    """What can be done with a pair that is one rank's part of a model."""
    yield f"It is the part of one rank of several, which compute together ({', '.join(collectives)})"
    yield (
        "python -m models.adopt makes a model folder of all of them, given --rank PREFILL DECODE for each in the order "
        "of the ranks"
    )
    yield "Only MindSpore Lite on Ascend runs that (runtime: mindspore_lite)"
    yield "For MindSpore itself, on Ascend or on a CPU, export the checkpoint with python -m models.export --tp N"


def shown(tensor: GraphTensor) -> str:
    """``tokens int32 [-1, 1]``, as people write it; long names by their last part."""
    return f"{tensor.name.rpartition('.')[2]} {tensor.dtype} {list(tensor.shape)}"


def as_data(contract: Contract) -> dict[str, Any]:
    """The same for a program."""
    return {
        "generation": contract.generation,
        "served": contract.generation in SERVED and not [*mismatches(contract), *obstacles(contract, "mindspore_lite")],
        "mismatches": list(mismatches(contract)),
        "obstacles": {way: list(obstacles(contract, way)) for way in get_args(Way)},
        "graphs": {phase: graph_data(graph, roles) for phase, graph, roles in contract.graphs},
        "explanation": explain(contract),
    }


def graph_data(graph: GraphFile, roles: Roles) -> dict[str, Any]:
    """One graph of it."""
    known = [role.name for role in roles]
    return {
        "file": str(graph.path),
        "mind_ir_version": graph.version,
        "producer": graph.producer,
        "inputs": [
            {"name": tensor.name, "role": role, "dtype": tensor.dtype, "shape": tensor.shape}
            for tensor, role in zip_longest(graph.inputs, known)
        ],
        "logits": graph.logits,
        "vocab_size": graph.vocab_size,
        "caches": len(graph.caches),
        "operators": sorted(graph.operators),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 if the pair is of a known kind and belongs together, else 1."""
    parser = argparse.ArgumentParser(prog="python -m models.contract", description=__doc__.splitlines()[0])
    parser.add_argument("prefill", type=Path, help="the MindIR of the prompt (older name: full model)")
    parser.add_argument("decode", type=Path, help="the MindIR of the next token (older name: incremental model)")
    parser.add_argument("--json", action="store_true", help="print what is known as JSON")
    args = parser.parse_args(arguments)
    try:
        contract = read_contract(args.prefill, args.decode)
    except mindir.MindIRError as error:
        print(f"contract: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(json.dumps(as_data(contract), indent=2) if args.json else explain(contract))  # noqa: T201
    return 0 if contract.generation and not any(mismatches(contract)) else 1


if __name__ == "__main__":
    sys.exit(main())
