"""Makers of tiny MindIR files with the inputs that MindFormers' exporters gave theirs, from one generation to the next.

What they compute is of no use: they are read, not run. ``tests.paged_pairs`` makes pairs that are run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from models.graphs import dynamic, write_graph

VOCAB, HIDDEN = 32, 8
CACHE = (4, 2, 16, 4)  # sequences, heads, tokens, numbers of a head


class Graph(nn.Cell):  # type: ignore[misc]
    """An embedding, a head and one layer's caches, which these generations have as Parameters."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.embed = weight("model.tok_embeddings.embedding_weight", (VOCAB, HIDDEN))
        self.head = weight("lm_head.weight", (VOCAB, HIDDEN))
        self.keys = weight("model.layers.0.attention.key_past", CACHE)
        self.values = weight("model.layers.0.attention.value_past", CACHE)
        self.matmul = ops.MatMul(transpose_b=True)

    def logits(self, tokens: Tensor) -> Any:
        """Logits that the caches have a share in, since MindSpore drops Parameters that nothing reads."""
        x = ops.gather(self.embed, tokens.reshape((-1,)), 0)
        return self.matmul(x, self.head) + self.keys.sum() + self.values.sum(), tokens


class Static(Graph):
    def construct(
        self, input_ids: Tensor, input_position: Tensor, init_reset: Tensor, batch_valid_length: Tensor
    ) -> Any:
        return self.logits(input_ids)


class EarlyPrefill(Graph):
    def construct(
        self,
        input_ids: Tensor,
        input_position: Tensor,
        init_reset: Tensor,
        batch_valid_length: Tensor,
        mask: Tensor,
        freqs_cos: Tensor,
        freqs_sin: Tensor,
    ) -> Any:
        return self.logits(input_ids)


class EarlyDecode(Graph):
    def construct(self, tokens: Tensor, input_position: Tensor, batch_valid_length: Tensor) -> Any:
        return self.logits(tokens)


class LaterEarlyDecode(Graph):
    def construct(
        self,
        tokens: Tensor,
        input_position: Tensor,
        init_reset: Tensor,
        batch_valid_length: Tensor,
        batch_index: Tensor,
        zactivate_len: Tensor,
    ) -> Any:
        return self.logits(tokens)


class Continuous(Graph):
    def construct(
        self, input_ids: Tensor, batch_valid_length: Tensor, batch_index: Tensor, zactivate_len: Tensor
    ) -> Any:
        tokens = input_ids
        return self.logits(tokens)


class ContinuousByIndex(Graph):
    def construct(self, tokens: Tensor, current_index: Tensor, batch_valid_length: Tensor, batch_index: Tensor) -> Any:
        return self.logits(tokens)


class Adder(nn.Cell):  # type: ignore[misc]
    """No language model at all."""

    def construct(self, x: Tensor, y: Tensor) -> Any:
        return x + y


def weight(name: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(Tensor(np.ones(shape, np.float32)), name=name, requires_grad=False)


def ints(*shape: int | None) -> Tensor:
    return dynamic(ms.int32, *shape)


def longs(*shape: int | None) -> Tensor:
    return dynamic(ms.int64, *shape)


def write(
    folder: Path, prefill: tuple[nn.Cell, list[Tensor]], decode: tuple[nn.Cell, list[Tensor]]
) -> tuple[Path, Path]:
    """Write a pair into ``folder``."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "prefill.mindir", folder / "decode.mindir"
    for path, (cell, inputs) in zip(paths, (prefill, decode), strict=True):
        write_graph(cell, path, *inputs)
    return paths


def static(folder: Path, lengths: tuple[int | None, ...] = (2,), rows: int | None = 2) -> tuple[Path, Path]:
    """Generation A."""

    def inputs(width: int) -> list[Tensor]:
        return [ints(rows, width), ints(rows), dynamic(ms.bool_, 1), ints(*lengths)]

    return write(folder, (Static(), inputs(16)), (Static(), inputs(1)))


def early(folder: Path, *, later: bool = False) -> tuple[Path, Path]:
    """Generation A', whose decode graph had more inputs later."""
    floats = [dynamic(ms.float32, 1, None, None), *(dynamic(ms.float32, None, 128) for _ in range(2))]
    prefill = [ints(None, None), ints(None), dynamic(ms.bool_, 1), ints(None), *floats]
    if later:
        decode = [ints(None, 1), ints(None), dynamic(ms.bool_, 1), ints(None), longs(None), longs(None)]
        return write(folder, (EarlyPrefill(), prefill), (LaterEarlyDecode(), decode))
    return write(folder, (EarlyPrefill(), prefill), (EarlyDecode(), [ints(None, 1), ints(None), ints(None)]))


def continuous(folder: Path, rows: int | None = 4, *, by_index: bool = False) -> tuple[Path, Path]:
    """Generation B, with zactivate_len or current_index."""

    def inputs(width: int | None) -> list[Tensor]:
        if by_index:
            return [ints(rows, width), ints(rows), longs(rows), longs(rows)]
        return [ints(rows, width), ints(rows), longs(rows), longs(None)]

    cell = ContinuousByIndex if by_index else Continuous
    return write(folder, (cell(), inputs(16 if rows else None)), (cell(), inputs(1)))


def no_pair(folder: Path) -> tuple[Path, Path]:
    """Two graphs that have nothing to do with language models."""
    return write(folder, *[(Adder(), [dynamic(ms.float32, 2), dynamic(ms.float32, 2)])] * 2)
