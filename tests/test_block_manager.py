"""The blocks of the cache: owners, what is known of them, and who gives way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.block_manager import NULL_BLOCK, BlockManager


def test_a_table_grows_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=10, block_size=4)
    table: list[int] = []
    for num_tokens, expected in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        assert blocks.grow(table, num_tokens)
        assert len(table) == expected
    assert (blocks.num_used, blocks.num_free, blocks.num_usable) == (3, 6, 9)


def test_growing_beyond_what_is_free_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    first: list[int] = []
    second: list[int] = []
    assert blocks.grow(first, 8)
    assert not blocks.grow(second, 8)
    assert second == []
    assert blocks.num_free == 1
    blocks.free(first)
    assert first == []
    assert blocks.grow(second, 12)


def test_the_null_block_is_never_given_away() -> None:
    blocks = BlockManager(num_blocks=5, block_size=1)
    table: list[int] = []
    assert blocks.grow(table, 4)
    assert sorted(table) == [1, 2, 3, 4]
    assert NULL_BLOCK not in table


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param([[]], id="lost"),
        pytest.param([[1, 2], [2]], id="shared"),
        pytest.param([[1, 2, 3]], id="free and owned"),
        pytest.param([[1, 2], [0]], id="null"),
    ],
)
def test_the_check_finds_what_is_wrong(tables: list[list[int]]) -> None:
    blocks = BlockManager(num_blocks=5, block_size=1)
    table: list[int] = []
    assert blocks.grow(table, 2)
    assert table == [1, 2]
    blocks.check([table])
    with pytest.raises(AssertionError):
        blocks.check(tables)


def test_a_known_prefix_is_taken_over_until_its_blocks_are_needed() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    first: list[int] = []
    assert blocks.grow(first, 12)
    for block, key in zip(first, (b"a", b"b", b"c"), strict=True):
        blocks.remember(block, key)
    kept = list(first)
    blocks.free(first)
    assert blocks.num_free == 5
    assert blocks.known([b"a", b"b", b"x", b"c"]) == kept[:2]
    second: list[int] = []
    assert blocks.spare(kept[:2], 16) == 5 - 4
    blocks.share(second, blocks.known([b"a", b"b"]))
    assert blocks.grow(second, 16)  # two blocks more: the empty ones, though a known one is free
    blocks.check([second])
    assert blocks.known([b"a", b"b", b"c"]) == kept
    third: list[int] = []
    assert blocks.grow(third, 4)
    assert third == kept[2:], "the last free block was a known one"
    assert blocks.known([b"a", b"b", b"c"]) == kept[:2]
    blocks.check([second, third])


def test_the_end_of_a_prefix_gives_way_before_its_begin_and_the_oldest_first() -> None:
    blocks = BlockManager(num_blocks=5, block_size=1)
    old: list[int] = []
    new: list[int] = []
    assert blocks.grow(old, 2)
    assert blocks.grow(new, 2)
    for key, block in zip((b"o1", b"o2", b"n1", b"n2"), (*old, *new), strict=True):
        blocks.remember(block, key)
    order = [old[1], old[0], new[1], new[0]]
    blocks.free(old)
    blocks.free(new)
    table: list[int] = []
    for block in order:
        assert blocks.grow(table, len(table) + 1)
        assert table[-1] == block


def test_a_block_of_several_owners_is_free_after_the_last() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    one: list[int] = []
    other: list[int] = []
    assert blocks.grow(one, 4)
    blocks.share(other, one)
    blocks.check([one, other])
    blocks.free(one)
    assert blocks.num_used == 1
    blocks.check([other])
    blocks.free(other)
    assert blocks.num_used == 0


def test_nothing_is_known_of_a_cache_that_was_lost() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    one: list[int] = []
    other: list[int] = []
    assert blocks.grow(one, 4)
    assert blocks.grow(other, 4)
    blocks.remember(one[0], b"a")
    blocks.remember(other[0], b"b")
    blocks.free(one)
    blocks.forget()
    blocks.check([other])
    assert blocks.known([b"a"]) == blocks.known([b"b"]) == []


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 9))),
    st.integers(2, 20),
    st.integers(1, 8),
)
def test_any_history_keeps_every_block_in_one_place(
    history: list[tuple[int, int, int]], num_blocks: int, block_size: int
) -> None:
    """Each entry grows one of six tables, or frees it where it has no tokens; or lets it begin with what is known."""
    blocks = BlockManager(num_blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(6)]
    for owner, num_tokens, key in history:
        table = tables[owner]
        before = list(table)
        missing = blocks.num_blocks_of(num_tokens) - len(before)
        known = blocks.known([bytes([key])])
        if num_tokens == 0:
            blocks.free(table)
        elif not table and known and num_tokens > block_size:
            spare = blocks.spare(known, num_tokens)
            blocks.share(table, known)
            assert blocks.grow(table, num_tokens) == (spare >= 0)
        elif blocks.grow(table, num_tokens):
            assert table[: len(before)] == before
            assert len(table) * block_size >= num_tokens
            if len(table) > len(before):
                blocks.remember(table[-1], bytes([key]))
        else:
            assert table == before
            assert missing > blocks.num_free
        blocks.check(tables)
