"""The policy: which group of agents gets a new request. Pure.

A request goes where the fewest tokens stand between it and its answer: those that the group has yet to compute for
others, and those of its own prompt that the group's cache does not hold. So a cached prefix is worth just the tokens
that it saves: it draws requests to its group until others are that much less busy, and then a second group computes the
prefix, too. Every request of a group counts as ``REQUEST_TOKENS`` more, for the tokens that it will go on to make.
``docs/scheduling.md`` has what this comes to, next to other rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REQUEST_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a group stands, as one new request sees it."""

    num_requests: int  # that wait or run
    num_tokens: int  # of these, that are yet to be computed before each has its next one
    num_known_tokens: int  # of the new request, that the group's cache holds

    @property
    def cost(self) -> int:
        """Tokens until the new request's answer, less those of its prompt, which are the same for all groups."""
        return self.num_tokens + REQUEST_TOKENS * self.num_requests - self.num_known_tokens


def choose(loads: Sequence[Load]) -> int:
    """The place of the group that gets the request; of several that are as good, the first."""
    return min(range(len(loads)), key=lambda place: loads[place].cost)
