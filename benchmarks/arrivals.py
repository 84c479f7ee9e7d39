"""When requests arrive in an open loop, fixed before the first one is sent: no answer can put off the next request."""

from __future__ import annotations

from random import Random
from typing import Literal

Pattern = Literal["poisson", "steady", "bursts"]
PATTERNS: dict[Pattern, str] = {
    "poisson": "each on its own, as those of many people",
    "steady": "one after another at equal distances",
    "bursts": "several at once, at equal distances",
}


def arrival_times(pattern: Pattern, rate: float, count: int, *, burst: int, random: Random) -> list[float]:
    """Seconds from the start of the load to each of ``count`` requests, ``rate`` a second in the long run.

    ``burst`` is how many come at once, for bursts.
    """
    if pattern == "steady":
        return [i / rate for i in range(count)]
    if pattern == "bursts":
        return [i // burst * burst / rate for i in range(count)]
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + random.expovariate(rate))
    return times
