"""The library behind structured output, under the same limits for server and agents.

llguidance keeps an automaton over bytes: no backtracking, and what a step may cost is counted, not timed, so that every
rank comes to the same result. Two things it does not bound by itself. Its recursion is as deep as the definitions of a
grammar lead to each other, so all of its work is done in a thread with a large stack. And a counted repetition becomes
as many states as it counts, which ``server.grammar`` bounds before a grammar comes here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from config.manifest import Manifest

_STACK_BYTES = 512 << 20  # of address space; 64 KiB of nested definitions use a tenth of it
_LIMITS = {  # a step of the worst grammars that keep to them takes tens of milliseconds, one of common ones 50 µs
    "max_grammar_size": 50_000,  # symbols
    "max_items_in_row": 2_000,  # ways in which what stands there can be read
    "step_max_items": 5_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 20_000,  # 1 to 2 kB each
}
T = TypeVar("T")


class GrammarEngine:
    """Matchers for the vocabulary of one exported model."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        self._path = Path(folder) / "tokenizer.json"
        self.vocab_size = manifest.vocab_size
        self.end_token_ids = list(manifest.tokenizer.eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[..., T], *arguments: object) -> Future[T]:
        """Do something with matchers in the thread that is theirs, one thing after another."""
        if self._thread is None:
            self._thread = _thread_with_stack()
        return self._thread.submit(work, *arguments)

    def open(self) -> LLTokenizer:
        """The model's vocabulary, read when it is first needed: 0.2 s for 50,000 tokens.

        Raises:
            ValueError: the tokenizer is of a kind that the library cannot read.
        """
        if self._tokenizer is None:
            source = self._path.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(source, n_vocab=self.vocab_size, eos_token=self.end_token_ids)
        return self._tokenizer

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of an answer; its ``get_error`` says what is wrong with the grammar.

        Raises:
            ValueError: as of ``open``.
        """
        limits = LLParserLimits(precompute_large_lexemes=False, verbose_errors=False, **_LIMITS)
        return LLMatcher(self.open(), grammar, log_level=0, limits=limits)

    def close(self) -> None:
        """End the thread when it has done what it is at."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)


def _thread_with_stack() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
    before = threading.stack_size(_STACK_BYTES)
    try:
        executor.submit(int).result()  # starts the thread
    finally:
        threading.stack_size(before)
    return executor
