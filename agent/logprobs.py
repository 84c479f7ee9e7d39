"""Log-probabilities: the log-softmax of raw logits, for known tokens and for the best ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.logits import Logits, Places
from agent.protocol import Floats, Ints
from agent.shortlist import best_tokens


def token_logprobs(
    logits: Logits, rows: Places, tokens: NDArray[np.integer[Any]], counts: Places
) -> tuple[Floats, Ints, Floats]:
    """Log-probabilities of one known token of each of these rows, and its best tokens with theirs.

    Tokens and counts ``[N]`` → ``[N]``; ids and log-probabilities ``[N, largest count]``, best first. A row that wants
    fewer has token 0 and NaN at its end.
    """
    if not len(rows):
        return np.empty(0, np.float32), *best_tokens(logits, rows, counts)
    largest = logits.maxima[rows].max(axis=1)
    sums = np.cumsum(logits.sums(rows, largest, 1.0), axis=1, dtype=np.float64)[:, -1]
    normalizers = largest + np.log(sums)
    known = logits.values[rows, tokens] - normalizers
    ids, best = best_tokens(logits, rows, counts)
    return known.astype(np.float32), ids, (best - normalizers[:, None]).astype(np.float32)
