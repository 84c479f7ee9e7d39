"""The blocks of the KV cache: which are free and which request owns which. Pure: no clock, no sockets."""

from __future__ import annotations

from collections.abc import Iterable

NULL_BLOCK = 0  # never owned: padding writes there


class BlockManager:
    """Hands out blocks 1 … ``num_blocks - 1`` of ``block_size`` tokens each.

    A block table is a plain list of block ids that belongs to one request; it is only changed here.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1, "the cache holds the null block and at least one other"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the block freed last is warm

    @property
    def num_usable(self) -> int:
        """Blocks that requests can own."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free)

    def missing(self, table: list[int], num_tokens: int) -> int:
        """Blocks that ``table`` lacks to hold ``num_tokens`` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(table))

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks until ``table`` holds ``num_tokens`` tokens; if too few are free, change nothing and say so."""
        count = self.missing(table, num_tokens)
        if count > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(count))
        return True

    def free(self, table: list[int]) -> None:
        """Take all blocks of ``table`` back and empty it."""
        self._free.extend(reversed(table))
        table.clear()

    def check(self, tables: Iterable[list[int]]) -> None:
        """Assert that every block is either free or in exactly one of ``tables``, which are all that there are."""
        seen = sorted([*self._free, *(block for table in tables for block in table)])
        assert seen == list(range(1, self.num_blocks)), "a block is lost, shared or free and owned at once"
