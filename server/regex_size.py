"""How large a regular expression is, found in linear time, without a parser that could be overrun."""

from __future__ import annotations

import re

_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_BRACES = re.compile(r"\\[pPxuU]\{[^}]{0,64}\}")
_FLAGS = re.compile(r"\(\?([a-zA-Z-]{1,16})[:)]")


def written_out(regex: str) -> int:
    """How many characters a regular expression has at most when its counted repetitions are written out.

    Raises:
        ValueError: it sets the flag x, with which white space and comments may stand before a count.
    """
    if any("x" in flags for flags in _FLAGS.findall(regex)):
        raise ValueError("sets the flag x, which is not supported")
    sizes, atom, at = [0], 0, 0  # of each open group; of the last atom, which a count repeats
    while at < len(regex):
        character = regex[at]
        if character == "\\":
            at += _escape_length(regex, at)
            atom = 1
        elif character == "[":
            at = _class_end(regex, at)
            atom = 1
        elif character == "(":
            sizes.append(0)
            atom, at = 0, at + 1
            continue
        elif character == ")" and len(sizes) > 1:
            atom = sizes.pop()
            at += 1
        elif character == "{" and (count := _COUNT.match(regex, at)):
            most = max(int((number or "0")[:9]) for number in count.groups())
            sizes[-1] += atom * (most - 1)
            atom *= most
            at = count.end()
            continue
        else:
            atom = 1
            at += 1
        sizes[-1] += atom
    return sum(sizes)


def _escape_length(regex: str, at: int) -> int:
    """Characters of an escape; ``\\p{Greek}`` and ``\\x{1F600}`` have braces that count nothing."""
    braces = _BRACES.match(regex, at)
    return braces.end() - at if braces else 2


def _class_end(regex: str, at: int) -> int:
    """Where a bracketed class ends; classes can hold classes."""
    depth = 0
    while at < len(regex):
        if regex[at] == "\\":
            at += 1
        elif regex[at] == "[":
            depth += 1
            at += regex.startswith("]", at + 1) + 2 * regex.startswith("^]", at + 1)  # this one is no end
        elif regex[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at
