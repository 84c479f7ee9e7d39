"""Which tokens a request has, and how often in its answer: what the penalties need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.protocol import Floats, Ints, SamplingParams


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

    def penalize(self, row: Floats, params: SamplingParams) -> None:
        """Change the logits ``row`` ``[vocab]`` in place, as Hugging Face and OpenAI define the penalties."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = row[ids]
        values = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        row[ids] = values - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
