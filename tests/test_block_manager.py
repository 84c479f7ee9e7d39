"""The free list of cache blocks."""

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
        pytest.param([[1, 2, 9]], id="unknown"),
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


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40))), st.integers(2, 20), st.integers(1, 8))
def test_any_history_keeps_every_block_in_one_place(
    history: list[tuple[int, int]], num_blocks: int, block_size: int
) -> None:
    """Each entry grows one of six tables, or frees it where it has no tokens."""
    blocks = BlockManager(num_blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(6)]
    for owner, num_tokens in history:
        before, missing = list(tables[owner]), blocks.missing(tables[owner], num_tokens)
        if num_tokens == 0:
            blocks.free(tables[owner])
        elif blocks.grow(tables[owner], num_tokens):
            assert tables[owner][: len(before)] == before
            assert len(tables[owner]) * block_size >= num_tokens
        else:
            assert tables[owner] == before
            assert missing > blocks.num_free
        blocks.check(tables)
