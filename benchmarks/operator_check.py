"""The C++ operators against MindSpore's standard ones on this machine: ``python -m benchmarks.operator_check``.

Each Cell of the seam between ``models.native`` and ``models.portable`` computes the same on random weights. Prints a
line of JSON for each; the exit code is 1 if two differ by more than sums in another order explain, 2 if there are no
C++ operators.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from kernels import library
from models import portable
from models.network import constant, rope_frequencies
from models.network_config import NetworkConfig
from models.weight_map import Floats, Weights

Array = NDArray[Any]

CONFIG = NetworkConfig(
    architecture="qwen2", num_layers=1, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    vocab_size=320, context_length=256, norm_eps=1e-5, rope_theta=10000.0, qkv_bias=True,
)  # fmt: skip
BLOCK_SIZE, BLOCKS = 8, 6
TOLERANCE = 1e-4  # of the largest number


@dataclass(frozen=True)
class Step:
    """One row: new tokens behind cached ones, in blocks 1, 2, …"""

    cached: int
    new: int

    def geometry(self) -> list[Array]:
        """What a geometry Cell takes: positions, slots, block tables, query and context lengths."""
        positions = np.arange(self.cached, self.cached + self.new, dtype=np.int32)
        blocks = np.arange(1, 2 + positions[-1] // BLOCK_SIZE, dtype=np.int32)[None]
        lengths = [np.array([length], np.int32) for length in (self.new, self.cached + self.new)]
        return [positions, positions + np.int32(BLOCK_SIZE), blocks, *lengths]


STEPS = {"prefill": (Step(0, 13), Step(11, 9)), "decode": (Step(20, 1),)}


class LayerCell(nn.Cell):  # type: ignore[misc]
    """A decoder layer with its geometry, as one graph."""

    def __init__(self, operators: ModuleType, phase: str, weights: Weights) -> None:
        super().__init__(auto_prefix=False)
        self.geometry = operators.GEOMETRY[phase](constant("rope", rope_frequencies(CONFIG)), BLOCK_SIZE)
        self.layer = operators.layers(phase, CONFIG, weights)[0]

    def construct(
        self,
        x: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        query_lens: Tensor,
        context_lens: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Any:
        geometry = self.geometry(positions, slot_mapping, block_tables, query_lens, context_lens)
        return self.layer(x, geometry, key_cache, value_cache)


class RandomWeights:
    """A checkpoint of random numbers, as each side of the seam reads it."""

    config = CONFIG

    def read(self, name: str) -> Floats:
        """The same numbers for the same name."""
        shape = CONFIG.weight_shapes()[name]
        seed = sorted(CONFIG.weight_shapes()).index(name)
        return normal(seed, *shape) * np.float32(1.0 if len(shape) == 1 else shape[-1] ** -0.5)

    def parameters(self, operators: ModuleType) -> Weights:
        """What Cells ask for by name; None where the network has nothing of it."""

        def weight(name: str) -> Parameter | None:
            if name not in operators.names(CONFIG):
                return None
            value = operators.read(self, name, "float32")
            return Parameter(Tensor(value), name=name, requires_grad=False)

        return weight


def normal(seed: int, *shape: int) -> Floats:
    """Random numbers."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def differences(native: ModuleType) -> Iterator[tuple[str, float]]:
    """By operator, the largest difference to the standard ones, relative to the largest number."""
    ours, theirs = (RandomWeights().parameters(side) for side in (native, portable))
    tokens = np.array([3, 319, 0, 7], np.int32)
    pair = [side.Embedding(w("embed_tokens"), w("norm")) for side, w in ((native, ours), (portable, theirs))]
    yield "embedding", difference(*(run(cell, [tokens])[0] for cell in pair))
    for phase, steps in STEPS.items():
        for step in steps:
            layers = LayerCell(native, phase, ours), LayerCell(portable, phase, theirs)
            yield f"layer, {phase}, {step.new} behind {step.cached} tokens", max(layer_differences(*layers, step))
    wanted = np.array([0, 2], np.int32)
    heads = [side.Head(w("norm"), CONFIG.norm_eps, w("head")) for side, w in ((native, ours), (portable, theirs))]
    yield "head", difference(*(run(cell, [normal(1, 4, CONFIG.hidden_size), wanted])[0] for cell in heads))


def layer_differences(ours: nn.Cell, theirs: nn.Cell, step: Step) -> Iterator[float]:
    """Of a layer's output, and of the keys and values that it writes or leaves to be written."""
    shape = BLOCKS, BLOCK_SIZE, CONFIG.num_kv_heads, CONFIG.head_dim
    x, caches = normal(2, step.new, CONFIG.hidden_size), [normal(3, *shape), normal(4, *shape)]
    geometry = step.geometry()
    written = [Tensor(cache.copy()) for cache in caches]
    y, *_ = run(ours, [x, *geometry, *written])
    expected, *fresh = run(theirs, [x, *geometry, *caches])
    yield difference(y, expected)
    for cache, new in zip(written, fresh, strict=True):
        yield difference(cache.asnumpy().reshape(-1, *shape[2:])[geometry[1]], new)


def run(cell: nn.Cell, inputs: Sequence[Any]) -> list[Array]:
    """Call a Cell on arrays: its outputs, flattened."""
    outputs = cell(*(one if isinstance(one, Tensor) else Tensor(one) for one in inputs))

    def flat(value: Any) -> Iterator[Array]:
        if isinstance(value, tuple):
            for one in value:
                yield from flat(one)
        else:
            yield value.asnumpy()

    return list(flat(outputs))


def difference(actual: Array, expected: Array) -> float:
    """The largest one, relative to the largest number; not a number if anything is."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def main() -> int:
    """Compare, print, and say whether all is well."""
    os.environ.setdefault("GLOG_v", "3")
    try:
        library.build()
    except library.BuildError as error:
        print(f"there are no C++ operators to compare: {error}", file=sys.stderr)
        return 2
    from models import native

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    found = dict(differences(native))
    for name, value in found.items():
        print(json.dumps({"operator": name, "difference": value, "tolerance": TOLERANCE}))
    return int(not all(value <= TOLERANCE for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
