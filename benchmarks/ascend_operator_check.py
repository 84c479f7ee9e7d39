"""Each Ascend operator on a device against its mirror on the CPU: ``python -m benchmarks.ascend_operator_check``.

Prints a line of JSON for each operator and dtype; the exit code is 1 if one fails, or differs by more than its dtype
explains. What an operator is taken to do stands in ``models.ascend_mirror`` and in docs/ascend.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops import auto_generate
from numpy.typing import NDArray

from models import ascend_mirror
from models.ascend import DTYPES, MASKED, PREFILL_MASK, UNBOUNDED

Array = NDArray[Any]

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 8, 2, 128, 128, 6
SCALE = DIM**-0.5
TOLERANCES = {"float16": 5e-3, "bfloat16": 3e-2}  # of the largest number: a few units of the last of their digits


@dataclass(frozen=True)
class Case:
    """One operator with its arguments."""

    name: str
    make: Callable[[ModuleType], Any]  # the operator, from the module that has it
    inputs: list[Any]  # arrays, and what else it takes
    outputs: Callable[[list[Any], Any], list[Tensor]]  # from inputs and result: what is compared


def cases(dtype: str) -> Iterator[Case]:
    """Every operator, on random numbers of a dtype."""
    number = DTYPES[dtype]

    def numbers(seed: int, *shape: int) -> Array:
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(number)

    def ints(*values: int) -> Array:
        return np.array(values, np.int32)

    tokens, width = 7, KV_HEADS * DIM
    caches = [numbers(seed, BLOCKS, BLOCK, KV_HEADS, DIM) for seed in (1, 2)]
    query, keys, values = numbers(3, tokens, HEADS * DIM), numbers(4, tokens, width), numbers(5, tokens, width)
    yield Case("RmsNorm", lambda m: m.RmsNorm(1e-5), [numbers(6, tokens, 256), numbers(7, 256)], first)
    yield Case("Swiglu", lambda m: m.Swiglu(), [numbers(8, tokens, 512), -1], whole)
    turns = [numbers(seed, tokens, DIM) for seed in (9, 10)]
    yield Case(
        "ApplyRotaryPosEmb",
        lambda m: m.ApplyRotaryPosEmb(2),
        [query, keys, *turns, ints(tokens)],
        lambda _, out: [*out],
    )
    slots = ints(*range(BLOCK + 3, BLOCK + 3 + tokens))
    yield Case(
        "ReshapeAndCache", lambda m: m.ReshapeAndCache(), [keys, values, *caches, slots], lambda given, _: given[2:4]
    )
    triangle = np.triu(np.ones((PREFILL_MASK, PREFILL_MASK), np.float32), 1)
    mask = (triangle * (1 if dtype == "bfloat16" else MASKED)).astype(number)
    yield Case(
        "FlashAttentionScore",
        lambda m: m.FlashAttentionScore(
            head_num=HEADS, scale_value=SCALE, pre_tokens=UNBOUNDED, next_tokens=UNBOUNDED, input_layout="TH"
        ),
        [query, keys, values, None, None, None, mask, None, ints(4, 3), ints(4, 3)],
        lambda _, out: [out[3]],
    )
    tables, contexts = np.array([[1, 2], [3, 0]], np.int32), ints(BLOCK + 40, 9)
    decode = [numbers(11, 2, HEADS * DIM), *caches, tables, contexts]
    yield Case("PagedAttention, decode", paged, decode, whole)
    lengths = ints(4, 3)
    seen = np.full((tokens, 2 * BLOCK), MASKED, np.float32)
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        for i in range(length):
            seen[4 * row + i, : context - length + i + 1] = 0
    chunk = [query, *caches, tables, contexts, None, None, seen.astype(number), lengths]
    yield Case("PagedAttention, chunk", paged, chunk, whole)


def paged(module: ModuleType) -> Any:
    return module.PagedAttention(HEADS, SCALE, KV_HEADS)


def whole(given: list[Any], out: Any) -> list[Tensor]:
    return [out]


def first(given: list[Any], out: Any) -> list[Tensor]:
    return [out[0]]


def run(case: Case, module: ModuleType) -> list[Array]:
    """What an operator gives, in float32. It gets arrays of its own: some are written to."""
    given = [Tensor(one.copy()) if isinstance(one, np.ndarray) else one for one in case.inputs]
    out = case.make(module)(*given)
    return [one.asnumpy().astype(np.float32) for one in case.outputs(given, out)]


def difference(case: Case, module: ModuleType) -> float:
    """The largest difference to the mirror, relative to the largest number."""
    pairs = list(zip(run(case, module), run(case, ascend_mirror), strict=True))
    return max(float(np.abs(ours - mirror).max() / np.abs(mirror).max()) for ours, mirror in pairs)


def main() -> int:
    """Compare, print, and say whether all is well."""
    os.environ.setdefault("GLOG_v", "3")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("Ascend")
    failed = False
    for dtype, tolerance in TOLERANCES.items():
        for case in cases(dtype):
            line: dict[str, Any] = {"operator": case.name, "dtype": dtype, "tolerance": tolerance}
            try:
                line["difference"] = difference(case, auto_generate)
                failed |= not line["difference"] <= tolerance
            except Exception as error:  # whatever an operator does, the others are looked at
                line["error"] = " ".join(str(error).split())[:500]
                failed = True
            print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
