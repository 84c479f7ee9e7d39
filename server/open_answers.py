"""The answers that are not finished yet, each with the timers of its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from server.answer import Answer
from server.events import happens
from server.request import Request


class OpenAnswers:
    """Answers by their requests, in the order in which they came. All methods but ``ended`` return at once."""

    def __init__(self) -> None:
        self._answers: dict[Request, Answer] = {}
        self._timers: dict[Request, tuple[asyncio.TimerHandle, ...]] = {}
        self._ended = asyncio.Event()
        self._ended.set()

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Answer]:
        """All of them; they may be dropped meanwhile."""
        return iter(list(self._answers.values()))

    def of(self, request: Request) -> Answer | None:
        """The answer of ``request``, unless that has ended."""
        return self._answers.get(request)

    def add(self, answer: Answer, timers: Iterable[asyncio.TimerHandle]) -> None:
        """Keep an answer, and ``timers`` that are cancelled when it is dropped."""
        self._answers[answer.request] = answer
        self._timers[answer.request] = tuple(timers)
        self._ended.clear()

    def drop(self, answer: Answer) -> None:
        """Forget an answer, which has ended or goes on elsewhere."""
        del self._answers[answer.request]
        for timer in self._timers.pop(answer.request):
            timer.cancel()
        if not self._answers:
            self._ended.set()

    async def ended(self, seconds: float) -> bool:
        """Wait until none is left, for ``seconds`` at most; whether that was enough."""
        return not self._answers or await happens(self._ended, seconds)
