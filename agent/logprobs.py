"""Log-probabilities: the log-softmax of raw logits, for known tokens and for the best ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol import Floats, Ints

_LARGEST_GROUP = 64


def token_logprobs(logits: Floats, tokens: NDArray[np.integer[Any]], count: int) -> tuple[Floats, Ints, Floats]:
    """Log-probabilities of one known token of each row, and the best tokens with theirs.

    Logits ``[N, vocab]`` and tokens ``[N]`` → ``[N]``; ids ``[N, count]`` and log-probabilities ``[N, count]``, best
    first.
    """
    known = np.empty(len(logits), np.float32)
    ids = np.empty((len(logits), count), np.int32)
    best = np.empty((len(logits), count), np.float32)
    for i, row in enumerate(logits):  # one row fits the processor's cache, all of them would not
        normalizer = _log_normalizer(row)
        known[i] = row[tokens[i]] - normalizer
        if count:
            ids[i] = best_tokens(row, count)
            best[i] = row[ids[i]] - normalizer
    return known, ids, best


def best_tokens(row: Floats, count: int) -> NDArray[np.int64]:
    """The ``count`` largest of ``row``, best first, of equal ones the first.

    Whole rows are not sorted. The row is dealt out to groups, at least four for each wanted token; ``count`` of them
    have a largest element that is at least the count-th largest of all these, so nothing below that is among the best.
    """
    if count >= row.size:
        candidates = np.arange(row.size)
    else:
        members = max(1, min(_LARGEST_GROUP, row.size // (4 * count)))
        groups = row.size // members
        largest = row[: members * groups].reshape(members, groups).max(axis=0)
        bound = np.partition(largest, groups - count)[groups - count]
        candidates = np.flatnonzero(row >= bound)
    order = np.argsort(-row[candidates], kind="stable")[:count]
    best: NDArray[np.int64] = candidates[order]
    return best


def _log_normalizer(row: Floats) -> float:
    """log Σ exp(logit) of one row ``[vocab]``."""
    peak = row.max()
    return float(peak + np.log(np.exp(row - peak).sum(dtype=np.float64)))
