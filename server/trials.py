"""Who made a step go wrong? Suspects run apart from all others until each is cleared or found guilty. Pure.

A step that an agent cannot run has one culprit as a rule, and its neighbours must not fall with it. Its requests are
tried in halves: a half that runs is cleared, one that fails is halved again, and a request that fails alone is guilty.
That takes twice as many steps as a binary search, and no more than that.

A step that an agent does not survive costs a restart, which takes seconds, so there the rule is another: whoever was in
flight at ``CRASHES_TO_SUSPECT`` crashes without getting any further in between is tried alone, and ``MAX_CRASHES`` of
them prove the guilt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from server.request import Request, Status

CRASHES_TO_SUSPECT = 2
MAX_CRASHES = 3


class Trials:
    """Groups of suspects, tried one after another."""

    def __init__(self) -> None:
        self._groups: deque[list[Request]] = deque()

    @property
    def group(self) -> list[Request]:
        """Those who run apart now; empty: everybody runs."""
        while self._groups:
            self._groups[0] = [request for request in self._groups[0] if request.status is not Status.FINISHED]
            if self._groups[0]:
                return self._groups[0]
            self._groups.popleft()
        return []

    def split(self, requests: Sequence[Request]) -> None:
        """A step with these requests and perhaps others raised: try them in halves."""
        self._remove(requests)
        middle = (len(requests) + 1) // 2
        self._groups.extendleft((list(requests[middle:]), list(requests[:middle])))

    def crashed(self, requests: Iterable[Request]) -> list[Request]:
        """An agent died while these requests were in flight: those who are guilty now."""
        guilty = []
        for request in requests:
            request.num_crashes += 1
            if request.num_crashes >= MAX_CRASHES:
                guilty.append(request)
            else:
                self.suspect(request)
        return guilty

    def suspect(self, request: Request) -> None:
        """A request has crashed agents, here or in another group: try it alone if that has happened too often."""
        if request.num_crashes >= CRASHES_TO_SUSPECT:
            self._remove([request])
            self._groups.append([request])

    def passed(self, request: Request) -> None:
        """The request has got a token: whatever went wrong before, it is over it."""
        request.num_crashes = 0
        if self._groups:
            self._remove([request])

    def dismiss(self, request: Request) -> None:
        """The request has left for another group of agents."""
        self._remove([request])

    def _remove(self, requests: Sequence[Request]) -> None:
        for group in self._groups:
            group[:] = [request for request in group if request not in requests]
