"""What a load asks: the project's prompts, those of a file, or lengths drawn from a distribution."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from benchmarks.prompts import PASSAGE, Prompt

PROMPT_KEYS = ("prompt", "inputs", "text")
LENGTH_KEYS = ("output_tokens", "max_tokens", "max_new_tokens", "output_len")
MAX_TOKENS = 1 << 20
EXAMPLE = '{"prompt": "What is money?", "output_tokens": 50}'

Lengths = Callable[[Random], int]
_LENGTHS = re.compile(r"(?:(uniform|lognormal):)?(\d+)(?::(\d+(?:\.\d+)?))?")


def from_file(path: Path, default_length: int | None) -> list[Prompt]:
    """The prompts of a JSON list or of JSON lines, each an object with a prompt and the length of its answer in tokens.

    Args:
        default_length: for objects that name none.

    Raises:
        ValueError: it holds something else, or nothing; the message says where.
        OSError: it cannot be read.
    """
    prompts = [_prompt(place, entry, default_length) for place, entry in _entries(path)]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: objects like {EXAMPLE} are needed, in a JSON list or one a line")
    return prompts


def lengths(text: str) -> Lengths:
    """A distribution of lengths in tokens.

    ``128`` is always the same, ``uniform:16:256`` any from 16 to 256, ``lognormal:128:0.7`` lies about the median 128,
    0.7 being the deviation of the logarithm.

    Raises:
        ValueError: it is written in no such way.
    """
    found = _LENGTHS.fullmatch(text)
    kind, number, more = found.groups(default="") if found else ("", "0", "")
    first = int(number)
    if not 1 <= first <= MAX_TOKENS or bool(kind) != bool(more):
        raise ValueError(f"{text!r} is no distribution of lengths: 128, uniform:16:256 or lognormal:128:0.7")
    if not kind:
        return lambda random: first
    second = float(more)
    if kind == "lognormal":
        return lambda random: min(MAX_TOKENS, max(1, round(random.lognormvariate(math.log(first), second))))
    if not first <= second <= MAX_TOKENS or not second.is_integer():
        raise ValueError(f"{text!r}: from the shortest to the longest, two whole numbers up to {MAX_TOKENS}")
    return lambda random: random.randint(first, int(second))


def drawn(tokenizer: Tokenizer, count: int, prompt: Lengths, answer: Lengths, random: Random) -> list[Prompt]:
    """``count`` prompts about as long as ``prompt`` says, cut from a text.

    Each begins with a number of its own, so that a server that keeps prefixes computes it anew.
    """
    passage = tokenizer.encode(PASSAGE, add_special_tokens=False).ids

    def text(number: int, length: int) -> str:
        head = f"Part {number}. "
        left = max(0, length - len(tokenizer.encode(head, add_special_tokens=False).ids))
        rounds = left // len(passage) + 1
        return f"{head}{tokenizer.decode((passage * rounds)[:left])}"

    start = random.randrange(10**6, 9 * 10**6)
    return [Prompt(text(start + i, prompt(random)), answer(random)) for i in range(count)]


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = path.read_text(encoding="utf-8-sig")  # Windows marks files of UTF-8 so
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None
    if content.lstrip().startswith("["):
        yield from ((f"{path}, entry {i}", entry) for i, entry in enumerate(_json(str(path), content), 1))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _json(f"{path}, line {number}", line)


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: this is no JSON: {error}") from None


def _prompt(place: str, entry: Any, default_length: int | None) -> Prompt:
    values = entry if isinstance(entry, dict) else {}
    text = next((values[key] for key in PROMPT_KEYS if key in values), None)
    length = next((values[key] for key in LENGTH_KEYS if key in values), default_length)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{place}: an object with a text under one of {', '.join(PROMPT_KEYS)} is needed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: the text holds a lone surrogate, half a character, which cannot be sent") from None
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= MAX_TOKENS:
        raise ValueError(
            f"{place}: a number of tokens under one of {', '.join(LENGTH_KEYS)}, or --output-tokens, is needed"
        )
    return Prompt(text, length)
