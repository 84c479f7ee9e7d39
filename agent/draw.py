"""One random token of each row, from the distribution that temperature, top-k, top-p, min-p and typical-p leave.

A draw is a race (the Gumbel-max trick): every token has a random time of its own, made of the request's seed and the
token's id, which is divided by its probability, and the first one wins. So where rounding changes a model's logits a
little, as other rows in a step can make it do, hardly ever another token wins, be it the likeliest or the last of all.

Rows with filters are drawn from shortlists of their best tokens that are known to hold all that the filters keep. Sums
run along a row from its first element (``cumsum``), so they are the same to the last bit however far it is padded for
its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.logits import Logits, Places, weigh
from agent.protocol import Floats
from agent.shortlist import Shortlists, shortlists

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
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST_SHORTLIST = 64  # tokens of a row without top-k; if they do not suffice, it is tried with eight times as many


def draw(logits: Logits, rows: Places, settings: Settings) -> NDArray[np.int64]:
    """One token of each of these rows, with their ``SETTINGS``: token ids ``[N]``.

    Raises:
        FloatingPointError: a row holds NaN or infinity.
    """
    largest = logits.maxima[rows].max(axis=1)
    require_numbers(largest)
    tokens = np.zeros(len(rows), np.int64)
    filtered = (settings["top_k"] > 0) | (settings["top_p"] < 1) | (settings["min_p"] > 0) | (settings["typical_p"] < 1)
    possible = largest > -np.inf  # else everything is forbidden: token 0
    for places, way in (
        (np.flatnonzero(possible & filtered), _draw_filtered),
        (np.flatnonzero(possible & ~filtered), _draw_from_all),
    ):
        if places.size:
            tokens[places] = way(logits, rows[places], largest[places], settings[places])
    return tokens


def require_numbers(largest: Floats) -> None:
    """Raise FloatingPointError if a row's largest logit is none; that of a row with NaN in it is NaN."""
    if not (largest < np.inf).all():
        raise FloatingPointError("the logits hold NaN or infinity")


def race_times(settings: Settings, keys: NDArray[np.integer[Any]]) -> Doubles:
    """When the tokens of N rows would arrive if all were equally likely: exponential random numbers ``[N, C]``.

    A pure function of the seed, the token's number in the answer and the key, which is its id, or a negative number for
    a run (keys are ``[N, C]`` or ``[C]``): SplitMix64 (Steele and others, 2014), scrambled for each of the three.
    """
    rows = _mix(_mix(settings["seed"] + _STEP) + _steps(settings["number"]))
    bits = _mix(rows[:, None] + _steps(keys)) >> np.uint64(11)
    times: Doubles = -np.log((bits.astype(np.float64) + 0.5) * 2.0**-53)
    return times


def _steps(numbers: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    return (numbers.astype(np.uint64) + np.uint64(1)) * _STEP


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_from_all(logits: Logits, rows: Places, largest: Floats, settings: Settings) -> NDArray[np.int64]:
    """Draw rows without filters: first the run, by the sums of all, then the token in it."""
    sums = logits.sums(rows, largest, settings["temperature"])
    run = _first(sums, race_times(settings, -1 - np.arange(sums.shape[1])))
    first, weights = logits.runs(rows, run)
    weigh(weights, largest, settings["temperature"])
    return first + _first(weights, race_times(settings, first[:, None] + np.arange(weights.shape[1])))


def _draw_filtered(logits: Logits, rows: Places, largest: Floats, settings: Settings) -> NDArray[np.int64]:
    """Draw rows with filters, from longer and longer shortlists until each holds all that its filters keep."""
    tokens = np.zeros(len(rows), np.int64)
    counts = _first_counts(settings, logits.values.shape[1])
    totals = np.zeros(len(rows))
    whole = np.flatnonzero((settings["top_k"] == 0) & (settings["top_p"] < 1))
    if whole.size:
        sums = logits.sums(rows[whole], largest[whole], settings["temperature"][whole])
        totals[whole] = np.cumsum(sums, axis=1, dtype=np.float64)[:, -1]
    left = np.arange(len(rows))
    while left.size:
        too_short = []
        for part in shortlists(logits, rows[left], counts[left]):
            places = left[part.places]
            weights = _weights(part, largest[places], settings[places])
            total = np.where(settings["top_k"][places] > 0, np.cumsum(weights, axis=1)[:, -1], totals[places])
            too_short.append(places[~_suffices(part, weights, total, settings[places])])
            tokens[places] = _drawn(part, weights, total, settings[places])
        left = np.concatenate(too_short)
        counts[left] *= 8
    return tokens


def _first_counts(settings: Settings, vocab: int) -> NDArray[np.int64]:
    """To how many of its best tokens a row is cut at first. Typical-p alone may keep any token."""
    best = (settings["top_p"] < 1) | (settings["min_p"] > 0)
    return np.where(settings["top_k"] > 0, settings["top_k"], np.where(best, _FIRST_SHORTLIST, vocab))


def _weights(part: Shortlists, largest: Floats, settings: Settings) -> Doubles:
    """exp((logit - largest) / temperature) of the tokens that top-k leaves, ``[N, C]``; of the others 0."""
    weights = part.logits.copy()
    weigh(weights, largest, settings["temperature"])
    top_k = np.where(settings["top_k"] > 0, settings["top_k"], part.ids.shape[1])
    weights[np.arange(part.ids.shape[1]) >= top_k[:, None]] = 0
    return weights.astype(np.float64)


def _suffices(part: Shortlists, weights: Doubles, total: Doubles, settings: Settings) -> NDArray[np.bool_]:
    """Whether a list holds all tokens of its row that the filters may keep."""
    share = np.cumsum(weights, axis=1)[:, -1] >= settings["top_p"] * total
    least = weights[np.arange(len(weights)), part.sizes - 1]
    everything = (settings["top_k"] > 0) | (part.sizes == part.vocab)
    enough: NDArray[np.bool_] = everything | (share & (settings["top_p"] < 1)) | (least < settings["min_p"])
    return enough


def _drawn(part: Shortlists, weights: Doubles, total: Doubles, settings: Settings) -> NDArray[np.int64]:
    """Filter the lists, in place, and draw."""
    _keep_top_p(weights, total, settings["top_p"])
    weights[weights < settings["min_p"][:, None]] = 0  # the best token's weight is 1
    typical = np.flatnonzero(settings["typical_p"] < 1)
    if typical.size:
        weights[typical] = _typical(weights[typical], settings["typical_p"][typical])
    drawn: NDArray[np.int64] = part.ids[np.arange(len(weights)), _first(weights, race_times(settings, part.ids))]
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


def _first(weights: Floats | Doubles, times: Doubles) -> NDArray[np.int64]:
    """Which one of each row arrives first, ``[N]``, when likely ones are faster: never one whose weight is 0."""
    return np.asarray((weights / times).argmax(axis=1), np.int64)
