"""How long somebody who should give signs of life has given none."""

from __future__ import annotations

import asyncio

BEAT_SECONDS = 0.5  # between two signs of life
_TICKS_PER_SECOND = 4


class Silence:
    """Counts the ticks of our own event loop since the last sign.

    A tick counts once, however late it comes: when this process was stopped, its loop blocked or the whole machine
    suspended, the silence is not the other side's, whose signs wait to be read.
    """

    def __init__(self, seconds: float) -> None:
        self._limit = round(seconds * _TICKS_PER_SECOND)
        self._ticks = 0

    def broken(self) -> None:
        """Take note of a sign of life."""
        self._ticks = 0

    async def too_long(self) -> None:
        """Return when there has been no sign for as many seconds."""
        while self._ticks < self._limit:
            await asyncio.sleep(1 / _TICKS_PER_SECOND)
            self._ticks += 1
