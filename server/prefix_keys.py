"""What names the content of a cache block: a key of all tokens from the prompt's first to the block's last. Pure.

Two requests share a block only if its key is the same. Keys are chained SHA-256 digests, so nobody can make two
different prefixes meet, and they start from salts, so nobody can find out by timing what others have asked: one of the
process, and one of the tenant if a request names one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence


class PrefixKeys:
    """The keys of one request's full blocks, made as they are needed."""

    def __init__(self, block_size: int, salt: bytes, tenant: str | None) -> None:
        """``salt`` is the process's, ``tenant`` the request's own."""
        self._block_size = block_size
        self._parent = hashlib.sha256(salt + (b"" if tenant is None else b"\0" + tenant.encode())).digest()
        self._keys: list[bytes] = []

    def first(self, num_blocks: int, tokens: Callable[[int, int], Sequence[int]]) -> list[bytes]:
        """The keys of the first blocks; ``tokens(start, end)`` are the request's, which never change."""
        while len(self._keys) < num_blocks:
            start = len(self._keys) * self._block_size
            block = array("i", tokens(start, start + self._block_size))
            self._parent = hashlib.sha256(self._parent + block.tobytes()).digest()
            self._keys.append(self._parent)
        return self._keys[:num_blocks]
