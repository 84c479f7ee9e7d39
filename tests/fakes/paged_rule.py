"""What the graphs of a fake pair compute: the rule of ``agent.arithmetic_model``, over a cache that is inside of them.

A key holds a token and a value its position from 1. Prefill writes and looks at its own tokens only; decode writes one
token a row and reads all others back through the block table. A token that was written to or read from a wrong place
changes the answer, and a wrong position makes it ``#``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from agent.arithmetic_model import ALPHABET, BROKEN, END, VOCAB_SIZE

Arrays = Mapping[str, NDArray[np.int32]]
Cache = NDArray[np.float32]  # [blocks, tokens of a block, 1, 1]


def prefill(inputs: Arrays, keys: Cache, values: Cache) -> NDArray[np.float32]:
    """Logits ``[B, vocab]`` of the last token of each prompt."""
    tokens = inputs["tokens"]
    lengths = inputs["batch_valid_length"].reshape(-1)
    places = np.broadcast_to(np.arange(1, tokens.shape[1] + 1), tokens.shape)
    _write(keys, values, inputs["slot_mapping"], tokens, places)
    return _logits([next_token(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)])


def decode(inputs: Arrays, keys: Cache, values: Cache) -> NDArray[np.float32]:
    """Logits ``[B, 1, vocab]`` of the one token of each row."""
    lengths, tables = inputs["batch_valid_length"].reshape(-1), inputs["block_tables"]
    _write(keys, values, inputs["slot_mapping"], inputs["tokens"], lengths)
    following = []
    for table, length in zip(tables, lengths, strict=True):
        used = table[: -(-int(length) // keys.shape[1])]  # what comes after it is never read, as in PagedAttention
        tokens, places = (cache[used].reshape(-1)[:length].astype(int).tolist() for cache in (keys, values))
        following.append(next_token(tokens) if places == list(range(1, length + 1)) else BROKEN)
    return _logits(following)[:, None]


def next_token(tokens: list[int]) -> int:
    """The token that the rule lets follow."""
    for character in map(str.encode, ALPHABET):
        for begun in range(1, len(character)):
            if tokens[-begun:] == list(character[:begun]):
                return character[begun]
    number = sum(place * token for place, token in enumerate(tokens, start=1)) // 10 % (len(ALPHABET) + 1)
    return END if number == len(ALPHABET) else ALPHABET[number].encode()[0]


def _write(
    keys: Cache, values: Cache, slots: NDArray[np.int32], tokens: NDArray[np.int32], places: NDArray[np.int32]
) -> None:
    """As ReshapeAndCache does it: a negative slot is skipped, every other one is written."""
    kept = slots >= 0
    keys.reshape(-1)[slots[kept]] = tokens.reshape(-1)[kept]
    values.reshape(-1)[slots[kept]] = places.reshape(-1)[kept]


def _logits(following: list[int]) -> NDArray[np.float32]:
    logits = np.zeros((len(following), VOCAB_SIZE), np.float32)
    logits[np.arange(len(following)), following] = 2.0
    return logits
