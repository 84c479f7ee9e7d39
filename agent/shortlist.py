"""The best tokens of many rows at once. Most of a large vocabulary never comes into question, and is not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.logits import RUN, Logits, Places
from agent.protocol import Floats, Ints

_LARGEST_GROUP = 1 << 13  # runs whose tokens are in memory at a time


@dataclass(frozen=True)
class Shortlists:
    """The best tokens of some rows, best first and of equal ones the first, padded to the longest list."""

    places: Places  # [N], among the rows that were asked for
    ids: NDArray[np.int64]  # [N, C], padded with 0
    logits: Floats  # [N, C], padded with minus infinity
    sizes: NDArray[np.int64]  # [N]
    vocab: int  # the size of a list that holds all tokens


def shortlists(logits: Logits, rows: Places, counts: Places) -> Iterator[Shortlists]:
    """Of each of these rows at least the best ``counts`` tokens; rows with lists of like length come together.

    How long a list is may depend on the other rows; its order does not.
    """
    vocab = logits.values.shape[1]
    bounds = _bounds(logits, rows, counts)
    reached = logits.maxima[rows] >= bounds[:, None]
    for places in _of_like_size(np.count_nonzero(reached, axis=1)):
        place, run = np.nonzero(reached[places])
        first, values = logits.runs(rows[places][place], run)
        kept = values >= bounds[places][place][:, None]
        if values.shape[1] * logits.maxima.shape[1] > vocab:
            kept &= first[:, None] + np.arange(values.shape[1]) >= (run * RUN)[:, None]
        found, column = np.divmod(np.flatnonzero(kept), values.shape[1])
        sizes = np.bincount(place[found], minlength=len(places))
        yield _sorted(places, first[found] + column, values[found, column], sizes, vocab)


def best_tokens(logits: Logits, rows: Places, counts: Places) -> tuple[Ints, Floats]:
    """The best ``counts`` tokens of N rows, and their logits: each ``[N, largest count]``, of equal ones the first.

    A row that wants fewer has 0 and NaN at its end.
    """
    most = int(counts.max(initial=0))
    ids = np.zeros((len(rows), most), np.int32)
    values = np.full((len(rows), most), np.nan, np.float32)
    if not most:
        return ids, values
    for part in shortlists(logits, rows, counts):
        width = np.arange(min(most, part.ids.shape[1]))
        place, column = np.nonzero(width < np.minimum(part.sizes, counts[part.places])[:, None])
        ids[part.places[place], column] = part.ids[place, column]
        values[part.places[place], column] = part.logits[place, column]
    return ids, values


def _bounds(logits: Logits, rows: Places, counts: Places) -> Floats:
    """A number for each row that at least ``counts`` of its logits reach.

    As many runs have a maximum that is at least the ``counts``-th largest of all maxima, so as many tokens reach that.
    Groups of runs do as well and are fewer: at least four for each wanted token, which makes few lists any longer.
    """
    vocab, runs = logits.values.shape[1], logits.maxima.shape[1]
    bounds = np.full(len(rows), -np.inf, np.float32)
    few = np.flatnonzero(counts <= runs)
    if few.size:
        wanted = np.maximum(counts[few], 1)
        members = max(1, runs // (4 * int(wanted.max())))
        groups = runs // members
        maxima = logits.maxima[rows[few], : groups * members].reshape(few.size, members, groups).max(axis=1)
        places = groups - wanted
        maxima.partition(sorted(set(places.tolist())), axis=1)
        bounds[few] = maxima[np.arange(few.size), places]
    for i in np.flatnonzero((runs < counts) & (counts < vocab)):
        bounds[i] = np.partition(logits.values[rows[i]], vocab - counts[i])[vocab - counts[i]]
    return bounds


def _of_like_size(sizes: NDArray[np.int64]) -> Iterator[Places]:
    """Groups of places whose sizes have the same number of binary digits, none too large for memory."""
    digits = np.frexp(sizes)[1]
    for digit in set(digits.tolist()):
        places = np.flatnonzero(digits == digit)
        height = max(1, _LARGEST_GROUP >> digit)
        for first in range(0, places.size, height):
            yield places[first : first + height]


def _sorted(places: Places, ids: NDArray[np.int64], values: Floats, sizes: NDArray[np.int64], vocab: int) -> Shortlists:
    """Lists from the tokens of all rows, one row after the other."""
    shape = len(places), int(sizes.max(initial=0))
    filled = np.arange(shape[1]) < sizes[:, None]
    all_ids, all_values = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    all_ids[filled], all_values[filled] = ids, values
    order = np.argsort(-all_values, axis=1, kind="stable")
    return Shortlists(
        places=places,
        ids=np.take_along_axis(all_ids, order, axis=1),
        logits=np.take_along_axis(all_values, order, axis=1),
        sizes=sizes,
        vocab=vocab,
    )
