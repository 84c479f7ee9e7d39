"""What a grammar leaves to say: the allowed next tokens of one answer.

The library works in a thread of its own. It takes the chosen token and works out what may follow while the model runs
the next step, so that a row waits only where a step is shorter than that.
"""

from __future__ import annotations

import logging

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from agent.protocol import Ints
from config.grammar_engine import GrammarEngine

logger = logging.getLogger(__name__)


class GrammarFailed(Exception):
    """The grammar cannot go on: it reached a limit, or allows no token of this vocabulary."""


class GrammarState:
    """Where one answer stands in its grammar.

    Nothing here raises on a grammar's account. One that cannot go on has ``failed``; from then on it allows the model's
    end tokens and nothing else, as does one that is complete.
    """

    def __init__(self, engine: GrammarEngine, grammar: str, output_ids: Ints) -> None:
        """``output_ids`` is the answer so far."""
        self.failed = False
        self._engine = engine
        self._matcher: LLMatcher | None = None
        self._mask = engine.submit(self._start, grammar, output_ids.tolist())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, ``[vocab]``; always some."""
        error = self._mask.exception()
        if error is None:
            return self._mask.result()
        if not self.failed:
            logger.warning("an answer ends because its grammar cannot go on: %s", error)
            self.failed = True
        mask = np.zeros(self._engine.vocab_size, np.bool_)
        mask[self._engine.end_token_ids] = True
        return mask

    def advance(self, token: int) -> None:
        """The answer goes on with ``token``, one of the allowed."""
        if not self.failed:
            self._mask = self._engine.submit(self._follow, token)

    def _start(self, grammar: str, output_ids: list[int]) -> NDArray[np.bool_]:
        self._matcher = self._engine.matcher(grammar)
        return self._after(output_ids)

    def _follow(self, token: int) -> NDArray[np.bool_]:
        return self._after([token])

    def _after(self, tokens: list[int]) -> NDArray[np.bool_]:
        """What may follow these tokens. What comes after a complete answer is let pass."""
        matcher = self._matcher
        assert matcher is not None, "_start is the first job"
        for token in tokens:
            if not matcher.is_stopped():
                matcher.consume_token(token)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise GrammarFailed(matcher.get_error())
        mask = np.unpackbits(bits, count=self._engine.vocab_size, bitorder="little").view(np.bool_)
        if not matcher.is_accepting():
            mask[self._engine.end_token_ids] = False  # a grammar may name them anywhere
        if not mask.any():
            raise GrammarFailed("no token of the vocabulary can follow")
        return mask
