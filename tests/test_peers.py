"""What ranks find out together is what one rank with the whole vocabulary would have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.logits import Logits
from agent.peers import Peers
from agent.protocol import Floats
from agent.runner import RunnerBroken

T = TypeVar("T")
few = settings(max_examples=25, deadline=None)
shapes = given(rows=st.integers(1, 5), vocab=st.integers(20, 400), ranks=st.integers(2, 5), seed=st.integers(0, 99))


class Meeting:
    """A collective among threads: each gives an array and gets all of them, one below the other."""

    def __init__(self, ranks: int) -> None:
        self._given: list[Floats] = [np.empty(0, np.float32)] * ranks
        self._barrier = threading.Barrier(ranks, timeout=20)

    def of(self, rank: int) -> Callable[[Floats], Floats]:
        def gather(own: Floats) -> Floats:
            self._given[rank] = own
            self._barrier.wait()
            together: Floats = np.concatenate(self._given)
            self._barrier.wait()
            return together

        return gather


def on_all_ranks(ranks: int, vocab: int, task: Callable[[Peers, int], T]) -> list[T]:
    """What each rank's ``task`` returns, in their order; the first error is raised."""
    meeting = Meeting(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(lambda rank: task(Peers(meeting.of(rank), rank, ranks, vocab), rank), range(ranks)))


def parts(whole: Floats, ranks: int) -> list[Logits]:
    """Each rank's logits of its tokens; the last rank may have fewer."""
    tokens = -(-whole.shape[1] // ranks)
    return [Logits.of(whole[:, first : first + tokens].copy()) for first in range(0, whole.shape[1], tokens)]


@few
@shapes
def test_all_logits_are_the_whole(rows: int, vocab: int, ranks: int, seed: int) -> None:
    whole = np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32)
    own = parts(whole, ranks)
    if len(own) == ranks:
        for gathered in on_all_ranks(ranks, vocab, lambda peers, rank: peers.logits(own[rank])):
            assert np.array_equal(gathered.values, whole)
            assert np.array_equal(gathered.maxima, Logits.of(whole).maxima)


@few
@shapes
def test_candidates_have_the_best_of_all(rows: int, vocab: int, ranks: int, seed: int) -> None:
    whole = np.random.default_rng(seed).integers(0, 4, (rows, vocab)).astype(np.float32)  # with many ties
    own = parts(whole, ranks)
    if len(own) == ranks:
        for candidates in on_all_ranks(ranks, vocab, lambda peers, rank: peers.candidates(own[rank])):
            assert np.array_equal(candidates.best(), whole.argmax(axis=1))
            assert np.array_equal(candidates[1:].best(), whole[1:].argmax(axis=1))
            assert np.array_equal(candidates.maxima.max(axis=1), whole.max(axis=1))


def test_numbers_that_are_none_are_found() -> None:
    whole = np.ones((1, 40), np.float32)
    whole[0, 33] = np.nan
    own = parts(whole, 2)
    for candidates in on_all_ranks(2, 40, lambda peers, rank: peers.candidates(own[rank])):
        assert np.isnan(candidates.maxima.max())


def test_ranks_with_one_step_agree() -> None:
    on_all_ranks(3, 40, lambda peers, rank: peers.agree(b"the same"))


def test_ranks_with_different_steps_end() -> None:
    def differs(peers: Peers, rank: int) -> str:
        with pytest.raises(RunnerBroken) as raised:
            peers.agree(b"step 12 " if rank == 1 else b"step 13 ")
        return str(raised.value)

    assert on_all_ranks(3, 40, differs) == [
        "rank 0 and rank 1 were sent different steps",
        "rank 1 and rank 0, rank 2 were sent different steps",
        "rank 2 and rank 1 were sent different steps",
    ]
