"""Runs a load: sends each request when it is due, notes what becomes of it, and reads its answer once it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from benchmarks.exchange import Closed, Exchange, LoadError
from benchmarks.prompts import Prompt
from benchmarks.target import Reading, Target, read


@dataclass(frozen=True)
class Outcome:
    """What became of one request; times in seconds of ``time.perf_counter``."""

    prompt: Prompt
    due: float  # when it was to be sent
    sent: float  # when it was
    ended: float
    reading: Reading | None  # None if it failed
    error: str | None


class Traffic:
    """All requests of one load, on as many connections as run at a time.

    Attributes:
        running, done, failed, most: requests under way, ended, of these in vain, and most at a time.
        outcomes: of those that have ended, in the order in which they did; a load that is cancelled keeps them.
        cut_off: how many were under way when the load was cancelled.
    """

    def __init__(self, target: Target, answer_seconds: float) -> None:
        self.running = self.done = self.failed = self.most = self.cut_off = 0
        self.outcomes: list[Outcome] = []
        self._target = target
        self._answer_seconds = answer_seconds
        self._idle: list[Exchange] = []

    async def open_loop(self, work: Sequence[Prompt], times: Sequence[float]) -> list[Outcome]:
        """Send each at its time, however many run."""
        requests = [self._target.request(prompt) for prompt in work]
        begin = time.perf_counter()
        async with self._all_closed() as under_way:
            for prompt, request, offset in zip(work, requests, times, strict=True):
                due = begin + offset
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                under_way.append(asyncio.create_task(self._outcome(prompt, request, due)))
            await asyncio.gather(*under_way)
        return self.outcomes

    async def closed_loop(self, work: Sequence[Prompt], concurrent: int) -> list[Outcome]:
        """Send ``concurrent`` at a time, each followed by the next one when it has ended."""
        waiting = iter([(prompt, self._target.request(prompt)) for prompt in work])

        async def one_after_the_other() -> None:
            for prompt, request in waiting:
                await self._outcome(prompt, request, time.perf_counter())

        async with self._all_closed() as under_way:
            under_way += [asyncio.create_task(one_after_the_other()) for _ in range(concurrent)]
            await asyncio.gather(*under_way)
        return self.outcomes

    async def _outcome(self, prompt: Prompt, request: bytes, due: float) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        sent, reading, error = time.perf_counter(), None, None
        try:
            sent, reading = await self._ask(request)
        except (LoadError, OSError) as failure:
            error = str(failure) or type(failure).__name__
            self.failed += 1
        except asyncio.CancelledError:
            self.cut_off += 1
            raise
        finally:
            self.running -= 1
        self.done += 1
        self.outcomes.append(Outcome(prompt, due, sent, time.perf_counter(), reading, error))

    async def _ask(self, request: bytes) -> tuple[float, Reading]:
        if (kept := self._unused()) is not None:
            with contextlib.suppress(Closed):  # by the server, at the moment at which it was to be used again
                return await self._ask_on(kept, request)
        return await self._ask_on(await self._target.connect(), request)

    async def _ask_on(self, connection: Exchange, request: bytes) -> tuple[float, Reading]:
        sent, pieces = await connection.ask(request, self._answer_seconds)
        if connection.open:
            self._idle.append(connection)
        return sent, read(self._target.kind, pieces)

    def _unused(self) -> Exchange | None:
        while self._idle:
            if (connection := self._idle.pop()).open:
                return connection
        return None

    @contextlib.asynccontextmanager
    async def _all_closed(self) -> AsyncIterator[list[asyncio.Task[None]]]:
        """A list for tasks, none of which runs on afterwards, and no connection either."""
        under_way: list[asyncio.Task[None]] = []
        try:
            yield under_way
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            for connection in self._idle:
                connection.close()
