"""Each C++ operator alone, against the machine's limits: ``python -m benchmarks.operators``.

The shapes are those of SmolLM2-135M. Weights and caches lie in so many copies that no call finds its own in a CPU's
cache, as in a step of the model, where the other layers come between. Best of several passes; the table is written to
``output/bench/operators.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks import machine, result_files
from benchmarks.machine import Machine
from benchmarks.report import FOLDER
from kernels import library
from kernels.caller import Call
from kernels.library import Library
from models import weight_format

Array = NDArray[Any]
Kind = gguf.GGMLQuantizationType

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
TOKENS, HEAD_TOKENS = (1, 8, 32, 256), (1, 8, 32)  # a head sees only the last token of each row
DECODE = ((1, 100), (1, 1000), (1, 4000), (8, 100), (8, 1000), (8, 4000), (32, 200))  # rows, context of each
PREFILL = (100, 1000)  # tokens of one row
COLD_BYTES = 256 << 20  # in copies, together: more than a CPU's cache
PASSES = 5

HEAD = (
    "| operator | format | tokens | time | GB/s | of the limit | GFLOP/s | of the limit |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|"
)

# The formats of weights, by name: what GGUF calls their blocks; None: float32, as it is
WEIGHT_FORMATS: dict[str, Kind | None] = {
    "float32": None,
    "bfloat16": Kind.BF16,
    "int8": Kind.Q8_0,
    "q4_1": Kind.Q4_1,
    "q4_0": Kind.Q4_0,
}
# The formats of caches, by name: numpy's numbers (bfloat16's bits are in uint16), bytes of a head's scale
CACHE_FORMATS = {"float32": ("float32", 0), "bfloat16": ("uint16", 0), "float16": ("float16", 0), "int8": ("int8", 4)}


@dataclass(frozen=True)
class Operator:
    """One operator that multiplies by a weight."""

    name: str
    label: str
    rows: int  # of the weight
    columns: int
    inputs: Callable[[int, Array, Operator], list[Array]]  # tokens, weight
    outputs: Callable[[int], list[tuple[int, ...]]]


@dataclass(frozen=True)
class Timed:
    """One line of the table."""

    label: str
    format: str
    tokens: str
    seconds: float
    bytes: float  # that a call must read of weights or cache
    flops: float


def numbers(*shape: int) -> Array:
    """Random float32 numbers, the same each time."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def norm_inputs(tokens: int, weight: Array, operator: Operator) -> list[Array]:
    """Of operators that begin with a norm."""
    return [numbers(tokens, operator.columns), np.ones(operator.columns + 1, dtype=np.float32), weight]


def residual_inputs(tokens: int, weight: Array, operator: Operator) -> list[Array]:
    """Of operators that end with an addition."""
    return [numbers(tokens, operator.rows), numbers(tokens, operator.columns), weight]


def head_inputs(tokens: int, weight: Array, operator: Operator) -> list[Array]:
    """Of the head, which is asked for the logits of every token."""
    x, norm, _ = norm_inputs(tokens, weight, operator)
    return [x, np.arange(tokens, dtype=np.int32), norm, weight]


QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
OPERATORS = (
    Operator("NormLinear", "norm, qkv", QKV, HIDDEN, norm_inputs, lambda t: [(t, QKV)]),
    Operator("ResidualLinear", "output, residual", HIDDEN, HEADS * HEAD_DIM, residual_inputs, lambda t: [(t, HIDDEN)]),
    Operator(
        "NormGatedLinear", "norm, gate/up, SwiGLU", 2 * INTERMEDIATE, HIDDEN, norm_inputs, lambda t: [(t, INTERMEDIATE)]
    ),
    Operator("ResidualLinear", "down, residual", HIDDEN, INTERMEDIATE, residual_inputs, lambda t: [(t, HIDDEN)]),
    Operator("Head", "norm, head", VOCABULARY, HIDDEN, head_inputs, lambda t: [(t, VOCABULARY), (t, VOCABULARY // 64)]),
)


def weight_of(operator: Operator, kind: Kind | None) -> Array:
    """A weight in one format: the same 768 rows again and again, as random numbers are slow to make and to pack."""
    part = numbers(min(768, operator.rows), operator.columns)
    packed: Array = part
    if kind is not None:
        packed = weight_format.panels(weight_format.quantised(part, kind), operator.columns)
    return np.ascontiguousarray(np.resize(packed, (operator.rows, packed.shape[1])))


def cold_weights(operator: Operator, name: str) -> list[Array]:
    """As many copies of a weight in one format as do not fit the CPU's cache together."""
    weight = weight_of(operator, WEIGHT_FORMATS[name])
    return [weight.copy() for _ in range(max(1, COLD_BYTES // weight.nbytes))]


def linear_calls(opened: Library, operator: Operator, weights: Sequence[Array], tokens: int) -> list[Call]:
    """The operator on each of ``weights``."""
    outputs = [np.empty(shape, dtype=np.float32) for shape in operator.outputs(tokens)]
    return [Call(opened, operator.name, [*operator.inputs(tokens, weight, operator), *outputs]) for weight in weights]


def linear_lines(opened: Library, formats: Sequence[str]) -> Iterator[Timed]:
    """Every operator with a weight, in every format."""
    for operator in OPERATORS:
        for name in formats:
            weights = cold_weights(operator, name)
            for tokens in HEAD_TOKENS if operator.name == "Head" else TOKENS:
                calls = linear_calls(opened, operator, weights, tokens)
                seconds = fastest(calls if tokens < 256 else calls[:4])
                flops = 2.0 * tokens * operator.rows * operator.columns
                yield Timed(operator.label, name, str(tokens), seconds, weights[0].nbytes, flops)


def attention_lines(opened: Library, formats: Sequence[str]) -> Iterator[Timed]:
    """Attention of one layer: rows that decode, then one row that is read in."""
    cases = [(rows, context, 1) for rows, context in DECODE] + [(1, tokens, tokens) for tokens in PREFILL]
    for name in formats:
        for rows, context, new in cases:
            blocks = rows * -(-context // BLOCK) + 1
            dtype, scales = CACHE_FORMATS[name]
            layer_bytes = 2 * blocks * BLOCK * KV_HEADS * (HEAD_DIM + scales) * np.dtype(dtype).itemsize
            layers = min(LAYERS if new == 1 else 2, max(2, COLD_BYTES // layer_bytes))
            calls = attention_calls(opened, name, rows, context, new, blocks, layers)
            label = f"{rows} x 1 at {context}" if new == 1 else f"1 x {new}"
            pairs = rows * (new * context - new * (new - 1) / 2)  # of a query with a key
            read = rows * context * layer_bytes / blocks / BLOCK
            yield Timed("rope, cache, attention", name, label, fastest(calls), read, 4.0 * pairs * HEADS * HEAD_DIM)


def attention_calls(
    opened: Library, dtype: str, rows: int, context: int, new: int, blocks: int, layers: int
) -> list[Call]:
    """A call for each layer of a cache whose rows have ``context`` tokens, the last ``new`` of them new."""
    tokens, width = rows * new, -(-context // BLOCK)
    number, scales = CACHE_FORMATS[dtype]
    cache = (layers * blocks, BLOCK, KV_HEADS, HEAD_DIM + scales)
    keys, values = (np.zeros(cache, dtype=number) if scales else random_cache(cache, number) for _ in range(2))
    tables = np.arange(1, 1 + rows * width, dtype=np.int32).reshape(rows, width)
    positions = np.arange(context - new, context)
    slots = (tables[:, positions // BLOCK] * BLOCK + positions % BLOCK).reshape(-1).astype(np.int32)
    lens = [np.full(rows, size, dtype=np.int32) for size in (new, context)]
    qkv, turns, out = numbers(tokens, QKV), numbers(tokens, HEAD_DIM), np.empty((tokens, HEADS * HEAD_DIM), np.float32)
    constants = [np.array([layer, layers, HEADS, KV_HEADS, 1e-5], dtype=np.float32) for layer in range(layers)]
    return [
        Call(opened, "PagedAttention", [qkv, turns, slots, tables, *lens, keys, values, constant, out])
        for constant in constants
    ]


def random_cache(shape: tuple[int, ...], dtype: str) -> Array:
    """Keys or values; the upper halves of float32 numbers are bfloat16."""
    values = numbers(1 << 16)
    return np.resize(values.view(np.uint16)[1::2] if dtype == "uint16" else values.astype(dtype), shape)


def fastest(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one of ``calls`` when all are made in turn, in the best pass."""

    def all_in_turn() -> None:
        for call in calls:
            call()

    return machine.best(all_in_turn, PASSES) / len(calls)


def row(line: Timed, limits: Machine) -> str:
    """A line in Markdown."""
    read, flops = line.bytes / line.seconds / 1e9, line.flops / line.seconds / 1e9
    cells = (
        line.label,
        line.format,
        line.tokens,
        f"{line.seconds * 1e6:.0f} µs",
        f"{read:.1f}",
        f"{100 * read / limits.read_gb:.0f} %",
        f"{flops:.0f}",
        f"{100 * flops / limits.gflops:.0f} %",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure and print all, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="*", choices=list(WEIGHT_FORMATS), default=list(WEIGHT_FORMATS))
    parser.add_argument("--caches", nargs="*", choices=list(CACHE_FORMATS), default=list(CACHE_FORMATS))
    parser.add_argument("--without-tiles", action="store_true", help="leave AMX alone, to see what it gains")
    arguments = parser.parse_args()
    limits = machine.measure()
    opened = library.Library(library.build())
    opened.set_threads(limits.cores)
    opened.use_tiles(not arguments.without_tiles)
    lines = [f"{machine.describe(limits)}; {library.TILES[opened.tiles()]}.", "", HEAD]
    print("\n".join(lines))
    for measured in (linear_lines(opened, arguments.weights), attention_lines(opened, arguments.caches)):
        for line in measured:
            lines.append(row(line, limits))
            print(lines[-1], flush=True)
    result_files.write(FOLDER / "operators", {".md": "\n".join(lines) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
