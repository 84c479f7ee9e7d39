"""The shapes that MindSpore Lite compiles the graphs of a pair for, each of them a *gear*.

GE compiles a graph with open dimensions for a list of shapes, and a call has to be of exactly one of them. So a call is
padded to the smallest gear that holds it, and a deployment starts only if there is one for all that it allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from agent.paged_inputs import PagedCall, Phase, Role
from config.manifest import Manifest, PagedGraph
from config.serving_config import LimitsConfig

SHORTEST = 64  # tokens of the first prefill gear where nobody chose them; each gear more is one more to compile
MAX_GEARS = 100  # of a graph, which is documented as GE's limit


class GearError(ValueError):
    """A graph has not the gears that it needs; the message says which, ``key`` where in a model's configuration."""

    def __init__(self, message: str, key: str = "runtime") -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class GraphInput:
    """One input of a graph."""

    name: str  # in its file
    role: Role
    dtype: str
    shape: tuple[int, ...]  # -1: open


@dataclass(frozen=True, order=True)
class Gear:
    """One shape of a graph's inputs."""

    rows: int
    length: int  # tokens of a row; 1 in a decode graph
    width: int  # blocks of a row; 0 in a graph without block tables

    def __str__(self) -> str:
        blocks = f" with {self.width} blocks each" if self.width else ""
        return f"{self.rows} row(s) of {self.length} token(s){blocks}"

    def holds(self, other: Gear) -> bool:
        """Whether a call of the other's size can be padded to this one."""
        return self.rows >= other.rows and self.length >= other.length and self.width >= other.width

    def shape(self, graph_input: GraphInput) -> tuple[int, ...]:
        """The shape of one input."""
        shapes: dict[Role, tuple[int, ...]] = {
            "token_ids": (self.rows, self.length),
            "valid_lengths": (self.rows,),
            "block_tables": (self.rows, self.width),
            "slot_mapping": (self.rows * self.length,),
        }
        shape = shapes[graph_input.role]
        if len(graph_input.shape) > len(shape):  # lengths can be a row or a column of a matrix
            return (1, *shape) if graph_input.shape[0] == 1 else (*shape, 1)
        return shape


@dataclass(frozen=True)
class Gears:
    """The gears of one graph, smallest first."""

    phase: Phase
    inputs: tuple[GraphInput, ...]  # in the graph's order
    gears: tuple[Gear, ...]

    @classmethod
    def of(cls, phase: Phase, inputs: Sequence[GraphInput], gears: Iterable[Gear]) -> Gears:
        """Gears in any order, each of which has to be a shape that the graph has.

        Raises:
            GearError: the graph's fixed dimensions exclude one, or there are too many.
        """
        ordered = tuple(sorted(set(gears), key=lambda gear: (gear.rows * gear.length, gear)))
        for gear in ordered:
            for graph_input in inputs:
                shape = gear.shape(graph_input)
                fits = len(shape) == len(graph_input.shape) and all(
                    fixed in (-1, size) for fixed, size in zip(graph_input.shape, shape, strict=True)
                )
                if not fits:
                    raise GearError(
                        f"{phase}: {gear} make {graph_input.name} {list(shape)}, "
                        f"and the graph has it as {list(graph_input.shape)}"
                    )
        if not 1 <= len(ordered) <= MAX_GEARS:
            raise GearError(f"{phase}: {len(ordered)} gears; a graph has 1 to {MAX_GEARS}")
        return cls(phase, tuple(inputs), ordered)

    def smallest(self, call: Gear) -> Gear:
        """The gear that a call of this size is padded to.

        Raises:
            GearError: there is none.
        """
        for gear in self.gears:
            if gear.holds(call):
                return gear
        raise GearError(f"{self.phase}: no gear holds {call}; the largest is {self.gears[-1]}")

    def gear_of(self, call: PagedCall, block_size: int) -> Gear:
        """The gear that a call is padded to."""
        rows, length = call.token_ids.shape
        blocks = -(-int(call.valid_lengths.max()) // block_size)
        return self.smallest(Gear(rows, length, blocks if has_tables(self.inputs) else 0))

    def check(self, needed: Gear) -> None:
        """See that there is a gear for the largest call that the limits allow.

        Raises:
            GearError: there is none.
        """
        if any(gear.holds(needed) for gear in self.gears):
            return
        largest = self.gears[-1]
        if largest.width < needed.width:
            remedy = f"adopt the pair again with a --context-length of {largest.width} blocks or less"
        elif self.phase == "prefill":
            remedy = f"set limits.max_num_batched_tokens to {largest.length} or less"
        else:
            remedy = f"set limits.max_num_seqs to {largest.rows} or less"
        raise GearError(
            f"{self.phase}: the gear for {needed} is missing, and the limits allow such a call; the largest there is "
            f"has {largest}. Add it, or {remedy}"
        )

    def most_rows(self, needed: Gear) -> int:
        """The rows that a call can have whatever else it is within ``needed``."""
        return max(gear.rows for gear in self.gears if gear.holds(needed))


def needed_gears(manifest: Manifest, limits: LimitsConfig) -> dict[Phase, Gear]:
    """The largest calls that a deployment's steps can come to: one prompt that fills a step, a token of every row."""
    assert manifest.pair, "only pairs have gears"
    tokens = min(
        limits.max_num_batched_tokens,
        manifest.context_length,
        manifest.capabilities.max_num_batched_tokens or limits.max_num_batched_tokens,
    )
    width = -(-manifest.context_length // manifest.block_size)
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    prefill, decode = map(graph_inputs, (manifest.pair.prefill, manifest.pair.decode))
    return {
        "prefill": Gear(1, tokens, width if has_tables(prefill) else 0),
        "decode": Gear(rows, 1, width if has_tables(decode) else 0),
    }


def graph_inputs(graph: PagedGraph) -> tuple[GraphInput, ...]:
    """What a graph of a pair takes, in its order. Their names in the manifest are those of their roles."""
    named = zip(graph.names, graph.inputs, strict=True)
    return tuple(GraphInput(name, cast(Role, tensor.name), tensor.dtype, tensor.shape) for name, tensor in named)


def has_tables(inputs: Iterable[GraphInput]) -> bool:
    """Whether a graph takes block tables."""
    return any(graph_input.role == "block_tables" for graph_input in inputs)


def generated(phase: Phase, inputs: Sequence[GraphInput], sizes: Sequence[int], needed: Gear) -> Gears:
    """Gears for a graph with open dimensions: prompts of these lengths, or so many rows of one token.

    No ``sizes``: powers of two up to what is needed. What the graph has fixed is taken as it is.
    """
    largest = needed.length if phase == "prefill" else needed.rows
    chosen = sizes or [*_powers_of_two(SHORTEST if phase == "prefill" else 1, largest), largest]
    fixed = _fixed(inputs)
    rows, length, width = fixed.get("rows"), fixed.get("length"), fixed.get("width", needed.width)
    if phase == "prefill":
        return Gears.of(phase, inputs, [Gear(rows or 1, length or size, width) for size in chosen])
    return Gears.of(phase, inputs, [Gear(rows or size, 1, width) for size in chosen])


def _powers_of_two(first: int, end: int) -> list[int]:
    return [1 << power for power in range(end.bit_length()) if first <= 1 << power < end]


def _fixed(inputs: Iterable[GraphInput]) -> dict[str, int]:
    """What a graph leaves no choice of."""
    names: dict[Role, tuple[str, ...]] = {"token_ids": ("rows", "length"), "block_tables": ("rows", "width")}
    return {
        name: size
        for graph_input in inputs
        for name, size in zip(names.get(graph_input.role, ()), graph_input.shape, strict=False)
        if size != -1
    }
