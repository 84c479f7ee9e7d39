"""How long a client waits, and how often it tries."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from client.client_errors import ClientError, NoConnection, NotServing, Overloaded

Wait = Literal["connect", "first_token", "between_tokens", "answer"]
MAX_SECONDS = 2_000_000  # 23 days: the system's own waits are counted in milliseconds of 31 bits


@dataclass(frozen=True)
class Timeouts:
    """The longest waits, in seconds; None waits forever.

    Raises:
        ValueError: one is not above 0, or above ``MAX_SECONDS``.
    """

    connect: float | None = 5.0
    first_token: float | None = 300.0  # of a stream: from sending the request, headers and all, until a token is there
    between_tokens: float | None = 60.0  # of a stream: from then, or from when its reader asks for more
    answer: float | None = 600.0  # of an answer in one piece: without any byte of it

    def __post_init__(self) -> None:
        for name, seconds in dataclasses.asdict(self).items():
            if seconds is not None and not 0 < seconds <= MAX_SECONDS:
                raise ValueError(
                    f"timeout {name}: {seconds:g} must be above 0 and at most {MAX_SECONDS} seconds; None waits forever"
                )

    @classmethod
    def all(cls, seconds: float | None) -> Timeouts:
        """Wait this long at most, whatever for."""
        return cls(seconds, seconds, seconds, seconds)

    def of(self, wait: Wait) -> float | None:
        """One of them, by name."""
        found: float | None = getattr(self, wait)
        return found


@dataclass(frozen=True)
class Retries:
    """Another try, only where the server has generated nothing: it was not there, or it refused for the moment.

    Raises:
        ValueError: a number is below 0, or no number.
    """

    times: int = 3  # after the first try
    longest_wait: float = 10.0  # seconds; a server that names a later time is not asked again
    first_wait: float = 0.25  # where the server names no time; twice as long each time

    def __post_init__(self) -> None:
        for name, number in dataclasses.asdict(self).items():
            if not 0 <= number < float("inf"):
                raise ValueError(f"retries {name}: {number} must be 0 or more, and finite")

    def wait(self, tried: int, error: ClientError) -> float | None:
        """Seconds until the next try after ``tried`` ones; None if ``error`` is final.

        Never earlier than the server says, and up to half as long again, so that clients do not come back all at once.
        """
        if tried > self.times or not isinstance(error, NoConnection | Overloaded | NotServing):
            return None
        if isinstance(error, NoConnection):
            named = None
            if error.lasting:
                return None
        else:
            named = error.retry_after
        wait = self.first_wait * 2 ** (tried - 1) if named is None else named
        return None if wait > self.longest_wait else wait * random.uniform(1.0, 1.5)


TIMEOUTS, RETRIES = Timeouts(), Retries()  # unless others are given


class Watch:
    """Breaks a blocking read off that takes too long, from a thread of its own.

    httpx has one timeout for all reads of an answer's body, which cannot be changed between the first one and the next.
    """

    def __init__(self, break_off: Callable[[], None]) -> None:
        self.ran_out = False
        self._break_off = break_off
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._closed = False
        threading.Thread(target=self._run, name="answer watch", daemon=True).start()

    @contextlib.contextmanager
    def limit(self, seconds: float | None) -> Iterator[None]:
        """What happens inside has so many seconds."""
        self._set(None if seconds is None else time.monotonic() + seconds)
        try:
            yield
        finally:
            self._set(None)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, deadline: float | None) -> None:
        with self._changed:
            # A thread that waits for an earlier time finds the new one when it wakes
            must_wake = deadline is not None and self._deadline is None
            self._deadline = deadline
            if must_wake:
                self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self.ran_out = True
                    self._break_off()
                    return
                self._changed.wait(left)
