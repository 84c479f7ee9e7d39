"""The C++ operators beside oneDNN's matrix products: ``python -m benchmarks.onednn``, with nothing else running.

oneDNN comes with PyTorch, which the test extra has. It gets bare products: no norm, no SwiGLU and no residual, and int8
with one scale for a whole token and one for a whole row, where the operators have one for each 32 numbers of both.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import machine, result_files
from benchmarks.operators import OPERATORS, TOKENS, Operator, cold_weights, fastest, linear_calls, numbers
from benchmarks.report import FOLDER
from kernels import library

FORMATS = ("float32", "bfloat16", "int8")
HEAD = "| product | format | tokens | operator here | oneDNN | oneDNN's time |\n|---|---|--:|--:|--:|--:|"


def products(operator: Operator, name: str, tokens: int, copies: int) -> list[Callable[[], object]]:
    """oneDNN's product of one shape with each of so many copies of a weight."""
    if name == "int8":
        return byte_products(operator, tokens, copies)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    x = torch.from_numpy(numbers(tokens, operator.columns)).to(dtype)
    weight = torch.from_numpy(numbers(operator.rows, operator.columns)).to(dtype)
    laid_out = [torch.ops.mkldnn._reorder_linear_weight(weight, tokens) for _ in range(copies)]
    return [partial(torch.ops.mkldnn._linear_pointwise, x, copy, None, "none", [], "") for copy in laid_out]


def byte_products(operator: Operator, tokens: int, copies: int) -> list[Callable[[], object]]:
    """The same of bytes, to float32."""
    x = torch.randint(0, 256, (tokens, operator.columns), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (operator.rows, operator.columns), dtype=torch.int8)
    scales, zeros = torch.ones(operator.rows), torch.zeros(operator.rows, dtype=torch.int64)
    laid_out = [torch.ops.onednn.qlinear_prepack(weight, [*x.shape]) for _ in range(copies)]
    options: tuple[Any, ...] = scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    return [partial(torch.ops.onednn.qlinear_pointwise, x, 0.1, 128, copy, *options) for copy in laid_out]


def main() -> int:
    """Measure both in turn, print a table and write it."""
    argparse.ArgumentParser(prog="python -m benchmarks.onednn", description=__doc__.splitlines()[0]).parse_args()
    limits = machine.measure()
    torch.set_num_threads(limits.cores)
    opened = library.Library(library.build())
    opened.set_threads(limits.cores)
    lines = [f"{machine.describe(limits)}; PyTorch {torch.__version__}.", "", HEAD]
    print("\n".join(lines))
    for operator, name, tokens in itertools.product(OPERATORS[:-1], FORMATS, TOKENS):
        calls = linear_calls(opened, operator, cold_weights(operator, name), tokens)
        ours, theirs = fastest(calls), fastest(products(operator, name, tokens, len(calls)))
        times = f"{ours * 1e6:.0f} µs | {theirs * 1e6:.0f} µs | {theirs / ours:.2f} x"
        lines.append(f"| {operator.label} | {name} | {tokens} | {times} |")
        print(lines[-1], flush=True)
    result_files.write(FOLDER / "onednn", {".md": "\n".join(lines) + "\n"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
