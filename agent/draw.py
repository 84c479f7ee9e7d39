"""One random token of each row, from the distribution that temperature, top-k, top-p, min-p and typical-p leave.

Most of a large vocabulary never comes into question: a row is cut to a shortlist of its best tokens that is known to
hold all that the filters keep, and the filters work on shortlists of like size together. There, sums run along a row
from its first element (``cumsum``), so they are the same to the last bit however far it is padded for its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.logprobs import best_tokens
from agent.protocol import Floats

Doubles = NDArray[np.float64]
Settings = NDArray[np.void]
SETTINGS = np.dtype(
    [
        ("temperature", np.float64),
        ("top_k", np.int64),  # 0: off
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("typical_p", np.float64),
        ("seed", np.uint64),
        ("number", np.int64),  # of the token in the answer, from 0
    ]
)
_FIRST_SHORTLIST = 256


@dataclass(frozen=True)
class _Shortlist:
    """The best tokens of a row, best first, and what their probabilities are shares of."""

    ids: NDArray[np.int64]
    weights: Floats  # exp((logit - largest) / temperature)
    total: float  # of all tokens that top-k leaves


def draw(rows: list[Floats], settings: Settings) -> NDArray[np.int64]:
    """One token of each row: rows of logits ``[vocab]`` with their ``SETTINGS`` → token ids ``[N]``.

    Raises:
        FloatingPointError: a row holds NaN or infinity.
    """
    tokens = np.zeros(len(rows), np.int64)
    uniform = uniform_numbers(settings["seed"], settings["number"])
    filtered = (settings["top_k"] > 0) | (settings["top_p"] < 1) | (settings["min_p"] > 0) | (settings["typical_p"] < 1)
    groups: dict[int, dict[int, _Shortlist]] = {}
    for i, row in enumerate(rows):
        largest = float(row.max())
        if np.isnan(largest) or largest == np.inf:
            raise FloatingPointError("the logits hold NaN or infinity")
        if largest == -np.inf:
            continue  # everything is forbidden: token 0
        if filtered[i]:
            shortlist = _shortlist(row, largest, settings[i])
            groups.setdefault(shortlist.ids.size.bit_length(), {})[i] = shortlist
        else:
            cumulated = np.cumsum(_weights(row, largest, settings[i]), dtype=np.float64)
            tokens[i] = np.searchsorted(cumulated, _target(cumulated[-1], uniform[i]), side="right")
    for group in groups.values():
        places = list(group)
        tokens[places] = _draw_filtered(list(group.values()), settings[places], uniform[places])
    return tokens


def uniform_numbers(seeds: NDArray[np.uint64], numbers: NDArray[np.int64]) -> Doubles:
    """Numbers in [0, 1), a pure function of seed and token number: SplitMix64 (Steele and others, 2014), scrambled."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(seeds + step) + (numbers.astype(np.uint64) + np.uint64(1)) * step
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _weights(logits: Floats, largest: float, settings: Any) -> Floats:
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest end at exp(-inf) = 0
        weights: Floats = np.exp((logits - np.float32(largest)) / np.float32(settings["temperature"]))
    return weights


def _shortlist(row: Floats, largest: float, settings: Any) -> _Shortlist:
    """The tokens that may pass the filters. Typical-p alone may keep any token; the others keep the best ones."""
    top_k, top_p, min_p = settings["top_k"], settings["top_p"], settings["min_p"]
    if top_k or not (top_p < 1 or min_p > 0):
        ids = best_tokens(row, top_k or row.size)
        weights = _weights(row[ids], largest, settings)
        return _Shortlist(ids, weights, float(np.cumsum(weights, dtype=np.float64)[-1]))
    total = float(np.sum(_weights(row, largest, settings), dtype=np.float64))
    size = _FIRST_SHORTLIST
    while True:
        ids = best_tokens(row, size)
        weights = _weights(row[ids], largest, settings)
        complete = weights.sum(dtype=np.float64) >= top_p * total if top_p < 1 else weights[-1] < min_p
        if complete or size >= row.size:
            return _Shortlist(ids, weights, total)
        size *= 8


def _draw_filtered(shortlists: list[_Shortlist], settings: Settings, uniform: Doubles) -> NDArray[np.int64]:
    """Filter and draw rows whose shortlists, padded with weights of 0, are ``[N, C]``."""
    width = max(shortlist.ids.size for shortlist in shortlists)
    ids = np.zeros((len(shortlists), width), np.int64)
    weights = np.zeros((len(shortlists), width))
    for i, shortlist in enumerate(shortlists):
        ids[i, : shortlist.ids.size] = shortlist.ids
        weights[i, : shortlist.ids.size] = shortlist.weights
    total = np.array([shortlist.total for shortlist in shortlists])
    _keep_top_p(weights, total, settings["top_p"])
    weights[weights < settings["min_p"][:, None]] = 0  # the best token's weight is 1
    typical = np.flatnonzero(settings["typical_p"] < 1)
    if typical.size:
        weights[typical] = _typical(weights[typical], settings["typical_p"][typical])
    drawn: NDArray[np.int64] = ids[np.arange(len(ids)), _pick(np.cumsum(weights, axis=1), uniform)]
    return drawn


def _keep_top_p(weights: Doubles, total: Doubles, top_p: Doubles) -> None:
    """Drop, in place, what comes after the best tokens whose probabilities reach ``top_p``; one always stays."""
    before = np.cumsum(weights, axis=1)[:, :-1]
    enough = (before >= (top_p * total)[:, None]) & (top_p < 1)[:, None]
    weights[:, 1:][enough] = 0


def _typical(weights: Doubles, typical_p: Doubles) -> Doubles:
    """Keep the tokens whose surprise is closest to the entropy until their probabilities reach ``typical_p``."""
    probabilities = weights / np.cumsum(weights, axis=1)[:, -1:]
    kept = probabilities > 0
    surprise = -np.log(probabilities, where=kept, out=np.zeros_like(probabilities))
    entropy = np.cumsum(probabilities * surprise, axis=1)[:, -1:]
    distance = np.where(kept, np.abs(surprise - entropy), np.inf)
    order = np.argsort(distance, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)[:, :-1]
    dropped = np.zeros_like(kept)
    np.put_along_axis(dropped, order[:, 1:], before >= typical_p[:, None], axis=1)
    return np.where(dropped, 0.0, weights)


def _pick(cumulated: Doubles, uniform: Doubles) -> NDArray[np.int64]:
    """Where a uniform number falls in each row of cumulated weights ``[N, C]``; never on a weight of 0."""
    target = _target(cumulated[:, -1], uniform)
    return np.asarray(np.count_nonzero(cumulated <= target[:, None], axis=1), np.int64)


def _target(total: Any, uniform: Any) -> Any:
    """The share ``uniform`` of ``total``, below ``total`` also after rounding."""
    return np.minimum(uniform * total, np.nextafter(total, 0))
