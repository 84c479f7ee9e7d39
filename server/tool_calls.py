"""Calls of tools in an answer, in the form that most templates with tools ask of their models (Hermes, Qwen)::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Bern"}}
    </tool_call>

A grammar keeps answers to it, so every call that is complete has the name of a tool and arguments of its schema. Text
may stand before the calls and not after them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """What an answer may call.

    ``tools`` are the schemas of their arguments by name: names of letters, digits, ``_`` and ``-``.
    """

    tools: Mapping[str, Mapping[str, Any]]
    required: bool  # the answer is calls and nothing else
    parallel: bool  # more than one

    def source(self) -> dict[str, Any]:
        """As the value of a constraint of the kind ``tool_calls``."""
        return {"tools": dict(self.tools), "required": self.required, "parallel": self.parallel}


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call in an answer."""

    name: str
    arguments: str  # a JSON object


def tool_grammar(choice: Mapping[str, Any], json_options: Mapping[str, Any]) -> str:
    """The grammar, in Lark, of an answer with calls; ``choice`` as of ``ToolChoice.source``."""
    more = f'("\\n{OPEN}" call)*' if choice["parallel"] else ""
    if choice["required"]:
        rules = [f'start: "{OPEN}" call {more}']
    else:
        rules = [
            f"start: TEXT | before call {more}",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){OPEN}(?s:.*)/",
            f'before[suffix="{OPEN}"]: /(?s:.*)/',
        ]
    names = list(choice["tools"])
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(names))))
    for i, name in enumerate(names):
        begin, end = json.dumps(f'\n{{"name": "{name}", "arguments": '), json.dumps(f"}}\n{CLOSE}")
        schema = {**choice["tools"][name], "type": "object", "x-guidance": dict(json_options)}
        rules.append(f"call{i}: {begin} arguments{i} {end}")
        rules.append(f"arguments{i}: %json {json.dumps(schema, ensure_ascii=False)}")
    return "\n".join(rules) + "\n"


class ToolCallParser:
    """Text of an answer as it comes → what of it is text, and its calls, each when it is complete."""

    def __init__(self) -> None:
        self._held = ""  # a call that is not complete, or what may become the beginning of one
        self._inside = False
        self._calls = False
        self._searched = 0  # characters of what is held that hold no end

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """The next piece: text that belongs to no call, and the calls that it completes."""
        self._held += text
        shown, calls = "", []
        while True:
            if not self._inside:
                before, tag, rest = self._held.partition(OPEN)
                if not tag:
                    kept = _beginning(before)
                    shown += before[: len(before) - kept]
                    self._held = before[len(before) - kept :]
                    break
                shown += before
                self._held, self._inside, self._searched = rest, True, 0
            end = self._held.find(CLOSE, self._searched)
            if end < 0:
                self._searched = max(0, len(self._held) - len(CLOSE) + 1)
                break
            body, self._held = self._held[:end], self._held[end + len(CLOSE) :]
            self._inside = False
            call = _call(body)
            if call:
                calls.append(call)
            else:
                shown += OPEN + body + CLOSE
        self._calls = self._calls or bool(calls)
        return ("" if self._calls and shown.isspace() else shown), calls

    def flush(self) -> str:
        """What is left at the end: text that looked like a call, or a call that was cut."""
        held = (OPEN if self._inside else "") + self._held
        self._held, self._inside = "", False
        return held


def _beginning(text: str) -> int:
    """How many characters at the end of ``text`` may begin a call."""
    for size in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if text.endswith(OPEN[:size]):
            return size
    return 0


def _call(body: str) -> ToolCall | None:
    """A call from what stands between its tags, if it is one."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    match call:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
        case _:
            return None
