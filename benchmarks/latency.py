"""From the times of answers to what is reported of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

LIMITS = ("ttft", "tpot", "e2e")  # what goodput can be bound to
FORM = "limits are written NAME:MILLISECONDS, like ttft:500 or ttft:500,tpot:50"


@dataclass(frozen=True)
class Answer:
    """One answer; times in seconds."""

    tokens: int
    sent: float  # when the request was, or in an open loop when it should have been
    arrivals: tuple[float, ...]  # when each event with text in it came

    @property
    def first(self) -> float:
        """From the request to the first text (TTFT)."""
        return self.arrivals[0] - self.sent

    @property
    def per_token(self) -> float:
        """Between two tokens after the first, on average (TPOT)."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)

    @property
    def whole(self) -> float:
        """From the request to the last text (E2E)."""
        return self.arrivals[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between one event and the next (ITL); a server that puts several tokens into an event has fewer gaps."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether it is within ``limits``, in milliseconds, each named as in ``LIMITS``."""
        took = {"ttft": self.first, "tpot": self.per_token, "e2e": self.whole}
        return all(1e3 * took[name] <= limit for name, limit in limits.items())


class Spread(msgspec.Struct, frozen=True):
    """How values lie, in their own unit."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def spread(values: Sequence[float]) -> Spread | None:
    """How ``values`` lie; None if there are none."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p95, p99 = (ordered[place(share, len(ordered))] for share in (0.5, 0.9, 0.95, 0.99))
    return Spread(sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def percentile(values: Sequence[float], share: float) -> float:
    """The value of which at least ``share`` of all ``values`` are no larger; the next larger one of two that are it."""
    return sorted(values)[place(share, len(values))]


def place(share: float, count: int) -> int:
    """Where it stands among so many ordered values, from 0 on. Tables and pictures take it from here."""
    return min(count - 1, int(share * count))


def limits_of(text: str) -> dict[str, float]:
    """``ttft:500,tpot:50`` as milliseconds by name.

    Raises:
        ValueError: a name is none of ``LIMITS``, or a number is not above 0.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in LIMITS or name in limits:
            raise ValueError(f"{part!r}: {FORM}; each of {', '.join(LIMITS)} once")
        try:
            limits[name] = float(number)
        except ValueError:
            raise ValueError(f"{part!r} has no number of milliseconds: {FORM}") from None
        if not 0 < limits[name] < float("inf"):
            raise ValueError(f"{part!r}: a limit is above 0")
    return limits
