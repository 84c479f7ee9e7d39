"""Maxima of runs, and what is found with their help, against the plain way over all logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logits import RUN, Logits
from agent.protocol import Floats
from agent.shortlist import best_tokens, shortlists

vocabularies = st.sampled_from([1, 2, RUN - 1, RUN, RUN + 1, 5 * RUN, 1000, 3000])


@st.composite
def all_logits(draw: st.DrawFn) -> Logits:
    """Up to six rows, with many equal numbers or few, and some tokens forbidden."""
    rows, vocab = draw(st.integers(1, 6)), draw(vocabularies)
    numbers = np.random.default_rng(draw(st.integers(0, 99)))
    values = numbers.integers(0, draw(st.sampled_from([2, 50, 10**6])), (rows, vocab)).astype(np.float32)
    values[0, : draw(st.integers(0, vocab))] = -np.inf
    return Logits.of(values)


def plain_maxima(values: Floats) -> list[list[float]]:
    return [[float(row[first : first + RUN].max()) for first in range(0, row.size, RUN)] for row in values]


@given(all_logits())
def test_maxima_and_best(logits: Logits) -> None:
    assert logits.maxima.tolist() == plain_maxima(logits.values)
    assert logits.best().tolist() == logits.values.argmax(axis=1).tolist()
    assert logits[1:].best().tolist() == logits.values[1:].argmax(axis=1).tolist()


def test_maxima_of_other_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"maxima \(2, 3\) are not those of logits \(2, 100\)"):
        Logits(np.zeros((2, 100), np.float32), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("values", [np.zeros((2, 9)), np.zeros((2, 18), np.float32)[:, ::2]])
def test_logits_that_cannot_be_read_in_place_are_refused(values: Floats) -> None:
    with pytest.raises(ValueError, match="no contiguous float32 numbers"):
        Logits.of(values)


@pytest.mark.parametrize("vocab", [1, RUN, 1000])
def test_not_a_number_is_the_maximum_of_its_run(vocab: int) -> None:
    values = np.zeros((3, vocab), np.float32)
    values[1, vocab // 2] = np.nan
    maxima = Logits.of(values).maxima
    assert np.isnan(maxima).sum(axis=1).tolist() == [0, 1, 0]
    assert np.isnan(maxima[1, vocab // 2 // RUN])


@given(all_logits(), st.data())
def test_best_tokens_are_those_of_a_stable_sort(logits: Logits, data: st.DataObject) -> None:
    vocab = logits.values.shape[1]
    count = st.integers(0, vocab) | st.integers(0, min(vocab, 12))
    rows = np.array(data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, unique=True)))
    counts = np.array([data.draw(count) for _ in rows])
    ids, values = best_tokens(logits, rows, counts)
    assert ids.shape == values.shape == (len(rows), counts.max())
    for i, (row, wanted) in enumerate(zip(rows, counts, strict=True)):
        expected = np.argsort(-logits.values[row], kind="stable")[:wanted]
        assert ids[i, :wanted].tolist() == expected.tolist()
        assert values[i, :wanted].tolist() == logits.values[row, expected].tolist()
        assert not ids[i, wanted:].any()
        assert np.isnan(values[i, wanted:]).all()


@given(all_logits(), st.data())
def test_shortlists_are_beginnings_of_the_sorted_row(logits: Logits, data: st.DataObject) -> None:
    vocab = logits.values.shape[1]
    counts = np.array([data.draw(st.integers(1, 2 * vocab)) for _ in range(len(logits))])
    seen = []
    for part in shortlists(logits, np.arange(len(logits)), counts):
        for i, row in enumerate(part.places):
            size = part.sizes[i]
            assert size >= min(counts[row], vocab)
            order = np.argsort(-logits.values[row], kind="stable")
            assert part.ids[i, :size].tolist() == order[:size].tolist()
            assert part.logits[i, :size].tolist() == logits.values[row, order[:size]].tolist()
            assert (part.logits[i, size:] == -np.inf).all()
        seen += part.places.tolist()
    assert sorted(seen) == list(range(len(logits)))


@given(all_logits(), st.data())
def test_changed_logits_have_their_maxima_and_are_undone(logits: Logits, data: st.DataObject) -> None:
    place = st.tuples(st.integers(0, len(logits) - 1), st.integers(0, logits.values.shape[1] - 1))
    places = data.draw(st.lists(place, max_size=30))
    rows, ids = np.array(places, np.int64).reshape(-1, 2).T
    new = np.random.default_rng(1).normal(size=len(places)).astype(np.float32)
    values, maxima = logits.values.copy(), logits.maxima.copy()
    expected = values.copy()
    for (row, token), value in zip(places, new, strict=True):
        expected[row, token] = value
    with logits.changed(rows, ids, new):
        assert (logits.values == expected).all()
        assert logits.maxima.tolist() == plain_maxima(expected)
    with pytest.raises(KeyError), logits.changed(rows, ids, new):
        raise KeyError
    assert (logits.values == values).all()
    assert (logits.maxima == maxima).all()


@pytest.mark.parametrize("vocab", [1, 61, 1000, 70_000])
def test_sums_of_runs(vocab: int) -> None:
    values = np.random.default_rng(vocab).normal(size=(5, vocab)).astype(np.float32)
    logits, rows = Logits.of(values), np.array([4, 0, 3])
    largest, temperatures = values[rows].max(axis=1), np.array([0.5, 1.0, 2.0])
    weights = np.exp((values[rows].astype(np.float64) - largest[:, None]) / temperatures[:, None])
    expected = np.add.reduceat(weights, np.arange(0, vocab, RUN), axis=1)
    np.testing.assert_allclose(logits.sums(rows, largest, temperatures), expected, rtol=1e-5)
    assert (values == logits.values).all()
