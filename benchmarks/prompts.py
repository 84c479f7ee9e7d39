"""The prompts of all measurements: short ones with the lengths of their answers, and one text for long ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

FOLDER = Path(__file__).parent
PASSAGE = (FOLDER / "passage.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and how many tokens the answer shall have, whatever they are."""

    text: str
    new_tokens: int


def short_prompts() -> list[Prompt]:
    """The instructions of ``prompts.txt``: one a line, after the length of a typical answer in tokens."""
    lines = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return [Prompt(text, int(length)) for length, text in (line.split("\t") for line in lines)]


def first(count: int) -> list[Prompt]:
    """``count`` short prompts, from the beginning again after the last one."""
    prompts = short_prompts()
    return [prompts[i % len(prompts)] for i in range(count)]


def long_prompts(tokenizer: Tokenizer, count: int, *, tokens: int, new_tokens: int, start: int = 0) -> list[Prompt]:
    """``count`` prompts of about ``tokens`` tokens from the passage.

    Each begins with a number of its own, from ``start`` on, so that a server that keeps prefixes computes it anew.
    """
    length = tokens - len(tokenizer.encode(f"Part {start}. ", add_special_tokens=False).ids)
    ids = tokenizer.encode(PASSAGE, add_special_tokens=False).ids[:length]
    text: str = tokenizer.decode(ids)
    return [Prompt(f"Part {start + i}. {text}", new_tokens) for i in range(count)]
