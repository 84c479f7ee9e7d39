"""Stop strings: text is held back while it may be the start of one, and cut before the first one found."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopChecker:
    """Looks for several strings in a text that comes in pieces, in time linear in the text.

    An Aho-Corasick automaton: a state is the longest end of the text so far that begins one of the strings, so just
    that many characters are held back. The string that ends first wins; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string has at least one character"
        self.stopped = False
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # characters of each state
        self._match = [0]  # characters of the longest string that ends in each state
        self._fallback = [0]  # the state of the longest proper end
        for stop in stops:
            self._insert(stop)
        self._link()

    def feed(self, text: str) -> str:
        """Take more text; returns what is safe to pass on. After a stop string was found, nothing is."""
        if self.stopped or len(self._next) == 1:
            return "" if self.stopped else text
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            self._state = self._advance(self._state, character)
            if self._match[self._state]:
                self.stopped, self._held = True, ""
                return whole[: end - self._match[self._state]]
        safe = len(whole) - self._depth[self._state]
        self._held = whole[safe:]
        return whole[:safe]

    def flush(self) -> str:
        """The text ends: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
                self._fallback.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Set the fallbacks, breadth first: a state's fallback is shorter, so it is complete already."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self._advance(self._fallback[state], character)
                self._match[child] = self._match[child] or self._match[self._fallback[child]]
                queue.append(child)

    def _advance(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)
