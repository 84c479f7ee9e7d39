"""Log-probabilities: the log-softmax of raw logits, for chosen tokens and for the best ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.protocol import Floats, Ints

_GROUP = 64  # neighbours whose largest is looked at first


def target_logprobs(logits: Floats, targets: Ints) -> Floats:
    """The log-probability of one token of each row: logits ``[N, vocab]``, targets ``[N]`` → ``[N]``."""
    values = np.empty(len(targets), np.float32)
    for i, target in enumerate(targets):  # a row fits the processor's cache, all of them would not
        values[i] = logits[i, target] - log_normalizer(logits[i])
    return values


def top_logprobs(logits: Floats, count: int) -> tuple[Ints, Floats]:
    """The best tokens of each row and their log-probabilities, best first: ``[N, count]`` each."""
    ids = np.empty((len(logits), count), np.int32)
    values = np.empty((len(logits), count), np.float32)
    if count:
        for i, row in enumerate(logits):
            ids[i] = best_tokens(row, count)
            values[i] = row[ids[i]] - log_normalizer(row)
    return ids, values


def log_normalizer(row: Floats) -> float:
    """log Σ exp(logit) of one row ``[vocab]``."""
    peak = row.max()
    return float(peak + np.log(np.exp(row - peak).sum(dtype=np.float64)))


def best_tokens(row: Floats, count: int) -> NDArray[np.int64]:
    """The ``count`` largest of ``row``, best first, of equal ones the first.

    Whole rows are not sorted: ``count`` groups have a largest element that is at least the count-th largest of these
    maxima, so no element below that is among the best.
    """
    groups = row.size // _GROUP
    if count >= row.size:
        candidates = np.arange(row.size)
    else:
        maxima = row[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1) if count * 4 <= groups else row
        bound = np.partition(maxima, maxima.size - count)[maxima.size - count]
        candidates = np.flatnonzero(row >= bound)
    order = np.argsort(-row[candidates], kind="stable")[:count]
    best: NDArray[np.int64] = candidates[order]
    return best
