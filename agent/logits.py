"""What a model says of the next tokens, and the largest of every run of neighbours: what sampling looks at first.

A vocabulary has tens of thousands of tokens, and few of them matter. The maxima tell which runs hold those, so that
greedy and top-k sampling read a few hundred numbers of a row and not all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol import Floats
from config.manifest import LOGITS_RUN

RUN = LOGITS_RUN  # neighbouring tokens that share a maximum
_BLOCK = 1 << 16  # logits that are worked on at a time: they fit the processor's cache, all rows would not

Places = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Logits:
    """The logits of L rows, and the largest of each ``RUN`` neighbours (the last run of a row may be shorter).

    A run with NaN in it has NaN for its maximum. Both arrays are contiguous and writable: ``changed`` works in place.
    """

    values: Floats  # [L, vocab]
    maxima: Floats  # [L, runs]

    def __post_init__(self) -> None:
        rows, vocab = self.values.shape
        if self.maxima.shape != (rows, -(-vocab // RUN)):
            raise ValueError(f"maxima {self.maxima.shape} are not those of logits {self.values.shape}")
        for array in (self.values, self.maxima):
            if array.dtype != np.float32 or not array.flags.c_contiguous:
                raise ValueError("logits or their maxima are no contiguous float32 numbers")

    @classmethod
    def of(cls, values: Floats) -> Logits:
        """Logits ``[L, vocab]`` whose maxima nobody has worked out yet."""
        return cls(values, np.maximum.reduceat(values, _starts(values), axis=1))

    def __getitem__(self, rows: slice) -> Logits:
        """Some rows, without a copy."""
        return Logits(self.values[rows], self.maxima[rows])

    def __len__(self) -> int:
        return len(self.values)

    def best(self) -> NDArray[np.int64]:
        """The token with the largest logit of each row, of equal ones the first, ``[L]``."""
        first, values = self.runs(np.arange(len(self)), self.maxima.argmax(axis=1))
        tokens: NDArray[np.int64] = first + values.argmax(axis=1)
        return tokens

    def runs(self, rows: Places, runs: Places) -> tuple[NDArray[np.int64], Floats]:
        """N runs, given by row and by number in it: the first token of each ``[N]``, and its logits ``[N, C]``.

        C is ``RUN`` or a smaller vocabulary. In place of a short last run it is the last C tokens of a row, of which
        those of the run before have logits of minus infinity.
        """
        vocab = self.values.shape[1]
        width = min(RUN, vocab)
        first = np.minimum(runs * RUN, vocab - width)
        shape = max(0, self.values.size - width + 1), width  # windows that begin at every token
        windows: Floats = np.ndarray(shape, np.float32, self.values, strides=(4, 4))
        values = windows[rows * vocab + first]
        if vocab % RUN:
            values[np.arange(width) < (runs * RUN - first)[:, None]] = -np.inf
        return first, values

    def sums(self, rows: Places, largest: Floats, temperatures: NDArray[np.float64] | float) -> Floats:
        """Σ exp((logit - largest) / temperature) of each run of N rows, ``[N, runs]``; the last two are ``[N]``."""
        sums = np.empty((len(rows), self.maxima.shape[1]), np.float32)
        starts, temperatures = _starts(self.values), np.broadcast_to(temperatures, len(rows))
        height = max(1, _BLOCK // self.values.shape[1])
        for first in range(0, len(rows), height):
            part = slice(first, first + height)
            block = self.values[rows[part]]
            weigh(block, largest[part], temperatures[part])
            np.add.reduceat(block, starts, axis=1, out=sums[part])
        return sums

    @contextmanager
    def changed(self, rows: Places, ids: Places, values: Floats) -> Iterator[None]:
        """Other logits in N places (rows, tokens and values, each ``[N]``) for a while.

        Of equal places the last counts. Nothing is copied but what changes.
        """
        all_values, all_maxima = self.values.reshape(-1), self.maxima.reshape(-1)  # views
        places, runs = rows * self.values.shape[1] + ids, rows * self.maxima.shape[1] + ids // RUN
        values_before, maxima_before = all_values[places], all_maxima[runs]
        moved = np.flatnonzero(~((values_before < maxima_before) & (values <= maxima_before)))  # other maxima, or NaN
        try:
            all_values[places] = values
            all_maxima[runs[moved]] = self.runs(rows[moved], ids[moved] // RUN)[1].max(axis=1)
            yield
        finally:
            all_values[places] = values_before
            all_maxima[runs[moved]] = maxima_before[moved]

    @contextmanager
    def restricted(self, rows: Sequence[int], allowed: Sequence[NDArray[np.bool_]]) -> Iterator[None]:
        """Minus infinity for a while where a token of these rows is not ``allowed`` (``[vocab]`` each).

        One row after the other, which fits the processor's cache; the others are not touched.
        """
        starts, before = _starts(self.values), []
        try:
            for row, mask in zip(rows, allowed, strict=True):
                values, maxima = self.values[row], self.maxima[row]
                before.append((row, values.copy(), maxima.copy()))
                values[~mask] = -np.inf
                np.maximum.reduceat(values, starts, out=maxima)
            yield
        finally:
            for row, values, maxima in before:
                self.values[row], self.maxima[row] = values, maxima


@dataclass(frozen=True)
class Candidates(Logits):
    """The logits of a few tokens of each row, the best one among them: enough where nothing but that is asked for."""

    ids: NDArray[np.int64]  # [L, C], the tokens, ascending

    @classmethod
    def among(cls, values: Floats, ids: NDArray[np.int64]) -> Candidates:
        """Tokens with their logits, ``[L, C]`` both."""
        return cls(values, np.maximum.reduceat(values, _starts(values), axis=1), ids)

    def __getitem__(self, rows: slice) -> Candidates:
        """Some rows, without a copy."""
        return Candidates(self.values[rows], self.maxima[rows], self.ids[rows])

    def best(self) -> NDArray[np.int64]:
        """The token with the largest logit of each row, of equal ones the first, ``[L]``."""
        tokens: NDArray[np.int64] = self.ids[np.arange(len(self)), super().best()]
        return tokens


def weigh(logits: Floats, largest: Floats, temperatures: NDArray[np.float64]) -> None:
    """Turn logits ``[N, C]`` into weights exp((logit - largest) / temperature), in place; the others are ``[N]``.

    Every weight depends on its own logit alone, to the last bit.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny temperature: all but the largest end at exp(-inf) = 0
        logits -= largest[:, None]
        logits /= temperatures.astype(np.float32)[:, None]
        np.exp(logits, out=logits)


def _starts(values: Floats) -> NDArray[np.int64]:
    """Where the runs of a row begin."""
    return np.arange(0, values.shape[1], RUN)
