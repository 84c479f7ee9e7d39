"""The blocks of the KV cache: which are free, who owns which, and what they are known to hold. Pure.

A block has one owner, several (a prefix that requests share), or none. Without an owner it may still hold the keys and
values of a known prefix, which the next request with that prefix takes over; of these blocks the one that was used
least recently is given away first, and only when no empty one is left.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0  # never owned: padding writes there


class BlockManager:
    """Hands out blocks 1 … ``num_blocks - 1`` of ``block_size`` tokens each.

    A block table is a plain list of block ids that belongs to one request; it is only changed here.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1, "the cache holds the null block and at least one other"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._empty = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the block freed last is warm
        self._kept: OrderedDict[int, None] = OrderedDict()  # no owner, content known; least recently used first
        self._owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}  # by key, see ``prefix_keys``
        self._key_of: dict[int, bytes] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that requests can own."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._empty) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_usable - self.num_free

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks until ``table`` holds ``num_tokens`` tokens; if too few are free, change nothing and say so."""
        count = self.num_blocks_of(num_tokens) - len(table)
        if count > self.num_free:
            return False
        table.extend(self._take() for _ in range(count))
        return True

    def known(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of keys."""
        blocks: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def spare(self, shared: Sequence[int], num_tokens: int) -> int:
        """Free blocks left (negative: lacking) after a table of ``num_tokens`` tokens that begins with ``shared``."""
        revived = sum(not self._owners[block] for block in shared)
        return self.num_free - revived - (self.num_blocks_of(num_tokens) - len(shared))

    def share(self, table: list[int], blocks: Iterable[int]) -> None:
        """Append blocks whose content is known; ``table`` owns them beside whoever does already."""
        for block in blocks:
            self._kept.pop(block, None)
            self._owners[block] += 1
            table.append(block)

    def remember(self, block: int, key: bytes) -> None:
        """Say what a full block holds. Of two blocks with the same content the first is the known one."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def free(self, table: list[int]) -> None:
        """Give up all blocks of ``table`` and empty it. Of a known prefix, the end will be given away first."""
        for block in reversed(table):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)
        table.clear()

    def forget(self) -> None:
        """The cache's content is lost: nothing is known any more. Owners stay."""
        self._empty.extend(self._kept)
        self._kept.clear()
        self._block_of.clear()
        self._key_of.clear()

    def check(self, tables: Iterable[list[int]]) -> None:
        """Assert that every block has just the owners in ``tables``, which are all that there are, or none."""
        owners = Counter(block for table in tables for block in table)
        assert NULL_BLOCK not in owners, "the null block has an owner"
        assert all(self._owners[block] == owners[block] for block in range(self.num_blocks)), "an owner is lost or left"
        free = sorted([*self._empty, *self._kept])
        assert free == [block for block in range(1, self.num_blocks) if not owners[block]], (
            "a block is lost or given twice"
        )
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "a key names another block"
        assert self._kept.keys() <= self._key_of.keys(), "a kept block holds nothing known"
        assert not self._key_of.keys() & set(self._empty), "an empty block is known"

    def _take(self) -> int:
        """A free block, empty if there is one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._owners[block] = 1
        return block
