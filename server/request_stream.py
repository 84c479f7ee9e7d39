"""What a client receives of its request: increments as they come, or the whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from server.errors import ServingError
from server.request import FinishReason, Request, TokenLogprob

StopKind = Literal["eos", "stop_token", "stop_string", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Increment:
    """A part of an answer, or all of it: the parts joined are the whole, exactly.

    ``text`` holds complete characters only. The text of the latest ``tokens`` may still be held back: inside a
    character, or because it may begin a stop string.
    """

    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()  # also those that leave no text: special ones, the one that ended the answer
    prompt_tokens: tuple[TokenLogprob, ...] = ()  # if asked for, all of them in the first increment
    finish_reason: FinishReason | None = None  # in the last increment
    stop_kind: StopKind | None = None  # beside "stop" and "length": what ended the answer


def join(increments: Sequence[Increment]) -> Increment:
    """Successive increments as one."""
    if len(increments) == 1:  # as most are
        return increments[0]
    return Increment(
        text="".join(increment.text for increment in increments),
        tokens=tuple(chain.from_iterable(increment.tokens for increment in increments)),
        prompt_tokens=tuple(chain.from_iterable(increment.prompt_tokens for increment in increments)),
        finish_reason=increments[-1].finish_reason if increments else None,
        stop_kind=increments[-1].stop_kind if increments else None,
    )


class Mailbox:
    """Increments on their way to one client; a slow one finds several."""

    def __init__(self) -> None:
        self._increments: list[Increment] = []  # at most the answer's tokens
        self._error: ServingError | None = None
        self._filled = asyncio.Event()

    def put(self, increment: Increment) -> None:
        self._increments.append(increment)
        self._filled.set()

    def fail(self, error: ServingError) -> None:
        """The answer ends with an error, after what is waiting here."""
        self._error = error
        self._filled.set()

    async def take(self) -> list[Increment]:
        """Wait for something and take all there is, in order.

        Raises:
            ServingError: nothing is left, and the answer could not be finished.
        """
        await self._filled.wait()
        if self._error and not self._increments:
            raise self._error
        increments, self._increments = self._increments, []
        if not self._error:
            self._filled.clear()
        return increments


class RequestStream:
    """One accepted request, for one reader: iterate over its increments, ``take`` or ``collect`` them.

    The request is aborted when the reader says so, leaves (``aclose``) or forgets the stream.
    """

    def __init__(self, request: Request, mailbox: Mailbox, on_abort: Callable[[], None]) -> None:
        self._request = request
        self._mailbox = mailbox
        self._on_abort = on_abort
        self._over = False
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's tokens, as the model gets them."""
        return tuple(self._request.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache already; known from the first increment on."""
        return self._request.num_cached_tokens

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Increment:
        """The next part of the answer; the one with a finish reason is the last.

        Raises:
            ServingError: the answer could not be finished.
        """
        increments = await self.take()
        if not increments:
            raise StopAsyncIteration
        return join(increments)

    async def take(self) -> list[Increment]:
        """The same part not joined: at most one token in each increment; no increment once the answer is over.

        Raises:
            ServingError: the answer could not be finished.
        """
        if self._over:
            return []
        try:
            increments = await self._mailbox.take()
        except ServingError:
            self._over = True
            raise
        self._over = increments[-1].finish_reason is not None
        return increments

    async def collect(self) -> Increment:
        """The rest of the answer as one increment: all of it, if nothing was read before.

        Raises:
            ServingError: the answer could not be finished.
        """
        return join([increment async for increment in self])

    def abort(self) -> None:
        """End the request now if it has not ended; its blocks are free after the step that is in flight."""
        self._on_abort()

    async def aclose(self) -> None:
        self.abort()

    def __del__(self) -> None:
        # Garbage is collected at any moment, in the middle of a step's planning too: abort when the loop is free.
        if not self._over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_abort)
