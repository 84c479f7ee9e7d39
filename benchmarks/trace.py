"""The requests of a simulation: when each arrives and how long it is, from a file or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta

from benchmarks.workload import MAX_TOKENS, Lengths

Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of one request before it arrives: a line of a file."""

    prompt_tokens: Tokens
    output_tokens: Tokens
    arrival: Annotated[float, Meta(ge=0)] | None = None  # seconds from the start; None: drawn
    priority: int = 0
    prefix: str | None = None  # requests that name the same begin with the same tokens
    prefix_tokens: Annotated[int, Meta(ge=0)] = 0  # how many of ``prompt_tokens`` these are


@dataclass(frozen=True)
class Job:
    """One request and its arrival in seconds."""

    arrival: float
    shape: Shape


_decoder = msgspec.json.Decoder(Shape)


def from_file(path: Path) -> list[Shape]:
    """Read JSON lines, each an object with ``prompt_tokens``, ``output_tokens`` and what else a ``Shape`` has.

    Raises:
        ValueError: a line is something else, or there is none; the message says which.
        OSError: the file cannot be read.
    """
    shapes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                shape = _decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if shape.prefix_tokens > shape.prompt_tokens or bool(shape.prefix_tokens) != bool(shape.prefix):
                raise ValueError(f"{path}, line {number}: a prefix has a name, and tokens within the prompt")
            shapes.append(shape)
    if not shapes:
        raise ValueError(f"{path} holds no requests")
    if any(shape.arrival is None for shape in shapes) and any(shape.arrival is not None for shape in shapes):
        raise ValueError(f"{path}: either every request has an arrival or none has")
    return shapes


def drawn(
    count: int,
    prompt: Lengths,
    output: Lengths,
    *,
    longest: int,
    prefixes: int,
    prefix_tokens: int,
    priorities: Sequence[int],
    random: Random,
) -> list[Shape]:
    """``count`` requests; lengths beyond a context of ``longest`` tokens are cut to it, the answer first.

    Each begins with one of ``prefixes`` texts of ``prefix_tokens`` tokens, which stand before what ``prompt`` draws,
    and has one of ``priorities``.

    Raises:
        ValueError: the context has no room for a prefix and what follows.
    """
    if prefix_tokens > longest - 2:
        raise ValueError(f"a prefix of {prefix_tokens} tokens leaves no room in a context of {longest}")
    shapes = []
    for _ in range(count):
        prompt_tokens = min(prefix_tokens + prompt(random), longest - 1)
        shapes.append(
            Shape(
                prompt_tokens=prompt_tokens,
                output_tokens=min(output(random), longest - prompt_tokens),
                priority=random.choice(priorities),
                prefix=f"{random.randrange(prefixes)}" if prefix_tokens else None,
                prefix_tokens=prefix_tokens,
            )
        )
    return shapes
