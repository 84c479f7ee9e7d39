"""Which tokens a request has, and how often in its answer: what the penalties need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.protocol import Floats, Ints

PENALTIES = np.dtype([("repetition", np.float32), ("frequency", np.float64), ("presence", np.float64)])


class TokenCounts:
    """The different tokens of prompt and answer as arrays that grow with the answer, at a constant cost a token."""

    def __init__(self, prompt_ids: Ints, output_ids: Ints) -> None:
        ids = np.unique(np.concatenate([prompt_ids, output_ids]))
        self._size = ids.size
        self._ids = ids.astype(np.int64)
        self._counts: NDArray[np.int64] = np.zeros(ids.size, np.int64)  # in the answer
        np.add.at(self._counts, np.searchsorted(ids, output_ids), 1)
        self._place = {int(token): place for place, token in enumerate(ids)}

    def add(self, token: int) -> None:
        """The answer grows by ``token``."""
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if self._size == self._ids.size:
                room = np.zeros(self._size + 16, np.int64)
                self._ids, self._counts = np.append(self._ids, room), np.append(self._counts, room)
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """The different tokens of prompt and answer, in no order, ``[n]``."""
        ids: NDArray[np.int64] = self._ids[: self._size]
        return ids

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often the answer has each of them, ``[n]``."""
        return self._counts[: self._size]


def penalized(values: Floats, counts: NDArray[np.int64], penalties: NDArray[np.void]) -> Floats:
    """Logits of tokens that a request has, as Hugging Face and OpenAI define the penalties.

    Args:
        values: their logits, ``[n]``.
        counts: how often the request's answer has each, ``[n]``.
        penalties: of each token's request, ``PENALTIES`` ``[n]``.
    """
    repetition = penalties["repetition"]
    values = np.where(values < 0, values * repetition, values / repetition)
    return (values - penalties["frequency"] * counts - penalties["presence"] * (counts > 0)).astype(np.float32)
