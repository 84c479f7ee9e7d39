"""The ranks of one model as each of them meets the others: through one collective that gathers numbers from all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agent.logits import Candidates, Logits
from agent.protocol import Floats
from agent.runner import RunnerBroken
from config.manifest import rank_tokens

Gather = Callable[[Floats], Floats]  # every rank's [L, W] one below the other, [ranks * L, W]


class Peers:
    """All ranks of a model. Each of them must call the same methods in the same order, or all wait for ever."""

    def __init__(self, gather: Gather, rank: int, world_size: int, vocab_size: int) -> None:
        self._gather = gather
        self._rank = rank
        self._world_size = world_size
        self._vocab_size = vocab_size
        self._tokens = rank_tokens(vocab_size, world_size)

    def agree(self, digest: bytes) -> None:
        """See that all ranks are about to run the same step, which ``digest`` stands for.

        Raises:
            RunnerBroken: they are not, and would wait for each other for ever in the model's collectives.
        """
        digests = self._all(np.frombuffer(digest, np.uint8).astype(np.float32)[None])[:, 0]
        others = np.flatnonzero((digests != digests[self._rank]).any(axis=1))
        if others.size:
            names = ", ".join(f"rank {rank}" for rank in others)
            raise RunnerBroken(f"rank {self._rank} and {names} were sent different steps")

    def complete(self, own: Logits, *, best_only: bool) -> Logits:
        """What all ranks say of the rows where one of them has ``own``: ``Candidates`` if these are enough."""
        if not len(own):
            return own
        return self.candidates(own) if best_only else self.logits(own)

    def logits(self, own: Logits) -> Logits:
        """The logits of all tokens from each rank's own."""
        values = own.values
        missing = self._tokens - values.shape[1]  # gathered are equal shapes
        if missing:
            values = np.pad(values, ((0, 0), (0, missing)), constant_values=-np.inf)
        whole = self._all(values).swapaxes(0, 1).reshape(len(own), -1)[:, : self._vocab_size]
        return Logits.of(np.ascontiguousarray(whole))

    def candidates(self, own: Logits) -> Candidates:
        """Each rank's best token of each row, and its logit."""
        best = own.best()
        largest = own.values[np.arange(len(own)), best]
        columns = np.stack((largest, best + self._rank * self._tokens), axis=1)
        gathered = self._all(columns.astype(np.float32)).swapaxes(0, 1)  # [L, ranks, 2]; ids are below 2 ** 24
        return Candidates.among(np.ascontiguousarray(gathered[:, :, 0]), gathered[:, :, 1].astype(np.int64))

    def _all(self, own: Floats) -> Floats:
        """Every rank's ``[L, W]``: ``[ranks, L, W]``."""
        return self._gather(np.ascontiguousarray(own)).reshape(self._world_size, *own.shape)
