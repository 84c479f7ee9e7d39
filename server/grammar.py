"""What an answer must be, from the terms of a request to a grammar that the agents take.

Nothing of a request is trusted: its source is bounded, what the library does not bound is bounded here, and a grammar
is compiled for the model's own vocabulary, in a thread, before its request is queued. What fails there is a mistake of
the request, with the reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from config.grammar_engine import GrammarEngine
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.regex_size import written_out
from server.request import Constraint, ConstraintKind
from server.tool_calls import tool_grammar

MAX_WRITTEN_OUT = 10_000  # characters of a regular expression when its counted repetitions are written out
_JSON_OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"[ \t\n\r]{0,20}",  # without a bound, a model with nothing to say writes nothing else
    "whitespace_flexible": True,
    "lenient": False,  # a keyword that cannot be kept is an error
    "coerce_one_of": False,
}
CACHED = 128  # grammars, those that cannot be used too
_COUNT = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
ANY_JSON_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarCompiler:
    """Turns constraints into grammars for one model, and remembers the last ones."""

    def __init__(self, engine: GrammarEngine, limits: LimitsConfig) -> None:
        self._engine = engine
        self._limits = limits
        self._known: OrderedDict[bytes, Future[str]] = OrderedDict()

    async def compile(self, constraint: Constraint) -> str:
        """The grammar, tried on the model's vocabulary: an answer can begin, and go on after what it must begin with.

        Raises:
            InvalidRequest: it cannot be used; the message says why.
        """
        if not self._engine.end_token_ids:
            raise InvalidRequest("needs a model with an end token, and this one has none", constraint.field)
        try:
            source = self._source(constraint)
            key = hashlib.sha256(f"{constraint.kind} {source}".encode()).digest()
            return await asyncio.shield(asyncio.wrap_future(self._compiled(key, constraint.kind, source)))
        except GrammarError as error:
            raise InvalidRequest(str(error), constraint.field) from None

    def close(self) -> None:
        self._engine.close()

    def _compiled(self, key: bytes, kind: ConstraintKind, source: str) -> Future[str]:
        """The same work is not done twice, not even at the same time."""
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        future = self._known[key] = self._engine.submit(self._compile, kind, source)
        if len(self._known) > CACHED:
            self._known.popitem(last=False)
        return future

    def _source(self, constraint: Constraint) -> str:
        """The text of a constraint, bounded."""
        value = constraint.value
        try:
            source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
            size = len(source.encode())
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"is no JSON that can be written down: {error}") from None
        if size > self._limits.max_grammar_bytes:
            raise GrammarError(f"has {size} bytes; at most {self._limits.max_grammar_bytes} are taken")
        return source

    def _compile(self, kind: ConstraintKind, source: str) -> str:
        """In the library's thread."""
        try:
            self._engine.open()
        except ValueError as error:
            raise GrammarError(f"cannot be served: the library does not read this model's tokenizer: {error}") from None
        begun = time.thread_time()
        if kind == "grammar":
            source = _lark(source)
        _check_repetitions(kind, source)
        grammar = _grammar(kind, source)
        matcher = self._engine.matcher(grammar)
        _check_mask(matcher)
        if forced := matcher.compute_ff_tokens():
            matcher.consume_tokens(forced)
            _check_mask(matcher)
        seconds = time.thread_time() - begun
        if seconds > self._limits.max_grammar_seconds:
            raise GrammarError(
                f"takes {seconds:.2f} s to compile; at most {self._limits.max_grammar_seconds:g} s are given to one"
            )
        return grammar


class GrammarError(ValueError):
    """A constraint that cannot be used; the message says why."""


def _check_mask(matcher: LLMatcher) -> None:
    """See that the answer can go on.

    Raises:
        GrammarError: it cannot.
    """
    bits = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error() or bits.count(0) == len(bits):
        raise GrammarError(_reason(matcher.get_error()))


def _check_repetitions(kind: ConstraintKind, source: str) -> None:
    """See that counted repetitions stay countable: the library makes a state of each.

    Raises:
        GrammarError: written out, they are too many.
    """
    try:
        size = _size(kind, source)
    except ValueError as error:
        raise GrammarError(f"cannot be used: {error}") from None
    if size > MAX_WRITTEN_OUT:
        raise GrammarError(
            f"is too long: with its counted repetitions written out, it has more than {MAX_WRITTEN_OUT} characters"
        )


def _size(kind: ConstraintKind, source: str) -> int:
    """Characters of the largest regular expression, repetitions written out; choices have none."""
    match kind:
        case "regex":
            return written_out(source)
        case "json_schema" | "tool_calls":
            return max(map(written_out, _patterns(json.loads(source))), default=0)
        case "grammar":  # rules repeat each other, so all counts may multiply
            counts = [max(int(count[:9]) for count in found.groups() if count) for found in _COUNT.finditer(source)]
            return math.prod(max(count, 1) for count in counts)
        case "choice":
            return 0


def _patterns(schema: Any) -> Iterator[str]:
    """All regular expressions of a schema, and texts that might be some."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "pattern" and isinstance(value, str):
                    yield value
                elif key == "patternProperties" and isinstance(value, dict):
                    yield from value
                pending.append(value)
        elif isinstance(node, list):
            pending += node


def _grammar(kind: ConstraintKind, source: str) -> str:
    """The library's form of a constraint."""
    match kind:
        case "json_schema":
            return _json_grammar(source)
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(_literal, json.loads(source))))
        case "tool_calls":
            return LLMatcher.grammar_from_lark(tool_grammar(json.loads(source), _JSON_OPTIONS))
        case "grammar":
            return LLMatcher.grammar_from_lark(source)


def _json_grammar(schema: str) -> str:
    options: Any = _JSON_OPTIONS  # the library has a type of its own for them, which cannot be imported
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise GrammarError(_reason(str(error))) from None


def _lark(source: str) -> str:
    """Lark as it is, and the other notation that is in use, ``root ::= …`` (GBNF), as Lark."""
    if "::=" not in source:
        return source
    try:
        lark: str = gbnf_to_lark(source)
    except Exception as error:  # the converter raises just that
        raise GrammarError(f"cannot be used: {str(error)[:300]}") from None
    return lark


def _literal(text: str) -> str:
    """A regular expression for this text and no other."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)


def _reason(error: str) -> str:
    """The library's message, shortened."""
    lines = [line.strip() for line in error.splitlines() if line.strip() not in ("", "<non-verbose/>")]
    if not lines or lines[0].startswith("NoExtension"):
        return "describes no text at all"
    return f"cannot be used: {' '.join(lines)[:300]}"
