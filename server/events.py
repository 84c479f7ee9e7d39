"""Waiting for an event, for a time."""

from __future__ import annotations

import asyncio


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for ``event``, for ``seconds`` at most; whether it is set.

    Before Python 3.12, ``asyncio.wait_for`` drops a cancellation that arrives together with the event.
    """
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((waiting,), timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()
