"""Silence is the other side's: our own pauses do not count."""

from __future__ import annotations

import asyncio
import time

from config.silence import Silence


def test_silence_becomes_too_long() -> None:
    asyncio.run(Silence(0.5).too_long())


def test_a_blocked_loop_is_not_the_silence_of_others() -> None:
    async def main() -> None:
        waiting = asyncio.create_task(Silence(0.5).too_long())
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251 — this is what it is about
        await asyncio.sleep(0)
        assert not waiting.done()
        await waiting

    asyncio.run(main())


def test_a_sign_of_life_starts_it_anew() -> None:
    async def main() -> None:
        silence = Silence(0.5)
        waiting = asyncio.create_task(silence.too_long())
        for _ in range(8):
            silence.broken()
            await asyncio.sleep(0.1)
        assert not waiting.done()
        await waiting

    asyncio.run(main())
