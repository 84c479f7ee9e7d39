"""The ranks of one model, each a process that says one line; the first that ends without it ends the wait for all."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from asyncio.subprocess import Process
from collections.abc import Sequence

GRACE_SECONDS = 5.0  # to end in, for a rank that has failed or is asked to


class RankLost(RuntimeError):
    """A rank has ended before it said anything."""


async def lines_of(ranks: Sequence[Process]) -> list[bytes]:
    """The line of each, once all have said theirs.

    Raises:
        RankLost: one has ended instead, so that the others would wait for it for ever.
    """
    reading = [asyncio.create_task(_line(number, len(ranks), rank)) for number, rank in enumerate(ranks)]
    try:
        return await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def end(ranks: Sequence[Process]) -> None:
    """Close their standard inputs, all before any of them can act on it, and end those that stay."""
    for rank in ranks:
        if rank.stdin is not None:
            rank.stdin.close()
    await asyncio.gather(*map(_end, ranks))


async def _line(number: int, ranks: int, rank: Process) -> bytes:
    assert rank.stdout is not None
    line = await rank.stdout.readline()
    if not line.endswith(b"\n"):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rank.wait(), GRACE_SECONDS)
        raise RankLost(f"rank {number} of {ranks} {_how(rank.returncode)}; what it said is above")
    return line


async def _end(rank: Process) -> None:
    try:
        await asyncio.wait_for(rank.wait(), GRACE_SECONDS)
    except asyncio.TimeoutError:
        rank.kill()
        await rank.wait()


def _how(code: int | None) -> str:
    if code is None:
        return "has failed"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
