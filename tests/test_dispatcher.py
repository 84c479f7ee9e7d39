"""Whom a request goes to: cases that a person can decide, and laws that hold for all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.dispatcher import REQUEST_TOKENS, Load, choose

COUNT = st.integers(0, 10_000)
LOADS = st.lists(st.builds(Load, num_requests=COUNT, num_tokens=COUNT, num_known_tokens=COUNT), min_size=1, max_size=8)


def load(num_requests: int, num_tokens: int = 0, known: int = 0) -> Load:
    return Load(num_requests=num_requests, num_tokens=num_tokens, num_known_tokens=known)


def test_the_first_of_idle_groups() -> None:
    assert choose([load(0), load(0), load(0)]) == 0


def test_fewer_requests() -> None:
    assert choose([load(3), load(2), load(4)]) == 1


def test_a_long_prompt_counts_for_more_than_a_short_one() -> None:
    assert choose([load(1, 4000), load(1, 20)]) == 1


def test_a_cached_prefix_is_worth_the_tokens_that_it_saves() -> None:
    known = 10 * REQUEST_TOKENS
    assert choose([load(9), load(18, known=known)]) == 1
    assert choose([load(9), load(20, known=known)]) == 0, "others are that much less busy"


@given(LOADS)
def test_nobody_is_better_than_the_chosen_one_in_all_respects(loads: list[Load]) -> None:
    best = loads[choose(loads)]
    for other in loads:
        assert (
            other.num_requests >= best.num_requests
            or other.num_tokens > best.num_tokens
            or other.num_known_tokens < best.num_known_tokens
        )


@given(LOADS, st.integers(1, 100))
def test_more_load_does_not_draw_requests(loads: list[Load], more: int) -> None:
    chosen = choose(loads)
    busier = [
        one if place == chosen else load(one.num_requests + more, one.num_tokens + more, one.num_known_tokens)
        for place, one in enumerate(loads)
    ]
    assert choose(busier) == chosen


@given(st.integers(2, 8), st.integers(1, 200))
def test_equal_requests_are_spread_evenly(groups: int, requests: int) -> None:
    counts = [0] * groups
    for _ in range(requests):
        counts[choose([load(count, 30 * count) for count in counts])] += 1
    assert max(counts) - min(counts) <= 1
