"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.stop_checker import StopChecker


def pieces(text: str, cuts: list[int]) -> list[str]:
    """``text`` cut at the given places, modulo its length."""
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(places)]


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, spelt out: the string that ends first wins, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.feed("Hello.\n") == "Hello."
    assert checker.feed("\nUs") == ""
    assert checker.feed("ed") == "\n\nUsed"
    assert checker.feed("\n\nUser: hi") == ""
    assert checker.stopped
    assert checker.feed("more") == ""
    assert checker.flush() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    checker = StopChecker(["STOP"])
    assert checker.feed("a STO") == "a "
    assert checker.flush() == "STO"
    assert not checker.stopped


def test_without_stop_strings_everything_passes() -> None:
    checker = StopChecker([])
    assert checker.feed("abc") == "abc"
    assert not checker.stopped


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["xabc", "ab"], "xabc", "x"),  # ends first, though it begins later
        (["b", "ab"], "ab", ""),  # end together: the longest
        (["aab"], "aaab", "a"),  # falls back within itself
        (["好的"], "你好好的", "你好"),
    ],
)
def test_which_string_wins(stops: list[str], text: str, expected: str) -> None:
    checker = StopChecker(stops)
    assert checker.feed(text) == expected
    assert checker.stopped


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=5),
    st.lists(st.integers(0, 100), max_size=10),
)
def test_any_cut_of_any_text_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    checker = StopChecker(stops)
    passed = "".join(checker.feed(piece) for piece in pieces(text, cuts)) + checker.flush()
    assert (passed, checker.stopped) == cut(text, stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    passed = ""
    for end, character in enumerate(text, start=1):
        passed += checker.feed(character)
        if checker.stopped:
            break
        held = text[len(passed) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)
