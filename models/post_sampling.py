"""The two graphs that the older system ran after the model: the best token, and the k best after a temperature."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops


class Argmax(nn.Cell):  # type: ignore[misc]
    """Logits f32 ``[rows, vocab]`` → the best token of each row, i32 ``[rows]``."""

    def construct(self, logits: Tensor) -> Tensor:
        return ops.cast(ops.argmax(logits, 1), ms.int32)


class TopK(nn.Cell):  # type: ignore[misc]
    """Logits f32 ``[rows, vocab]``, temperature f32 ``[rows]``, k i32 ``[]`` → the k best scaled logits of each row,
    descending, f32 ``[rows, k]``, and their tokens, i32 ``[rows, k]``; k up to the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = ops.TopK(sorted=True)

    def construct(self, logits: Tensor, temperature: Tensor, k: Tensor) -> Any:
        return self.top_k(logits / temperature.expand_dims(1), k)
