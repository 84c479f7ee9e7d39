"""The policy: which requests take part in the next step, and with how many tokens.

Pure: no clock, no sockets, no asyncio, so it can be read in one go and tested without processes. The rules:

- First come, first served. Requests are admitted in the order of arrival, and a queue that cannot serve its head waits.
- A step's token budget goes to decoding rows first (one token each), then to running prompts, then to the queue's head.
  A prompt beyond the budget is cut into chunks, so a long prompt never stalls running answers by more than one step.
- A request is admitted when a seat is free and its whole prompt has blocks, with one block to spare for each running
  row, so that the admission does not lead to a preemption a few tokens later.
- When a running row needs a block and none is free, the latest arrival is preempted: it gives up seat and blocks, keeps
  its answer so far and goes to the front of the queue, to be recomputed. The oldest row always goes on and one request
  alone always fits, so there is no deadlock, and nobody is dropped.
- One step is in flight at a time. A request that ends meanwhile keeps seat and blocks until that step is over.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from server.block_manager import BlockManager
from server.request import FinishReason, Request, Status

MAX_PROMPT_LOGITS = 256  # positions of a step: the logits of [positions, vocabulary] are large


class Row(NamedTuple):
    """One request's share of a step: its tokens from ``start`` to ``start + num_new_tokens``."""

    request: Request
    start: int
    num_new_tokens: int
    samples: bool  # the last of them is the last there is: the row gets a next token
    prompt_logits: range = range(0)  # positions in the prompt whose successor's log-probability is wanted


@dataclass(frozen=True)
class Step:
    """What one forward pass works on."""

    step_id: int
    rows: tuple[Row, ...]
    admitted: tuple[Request, ...]  # those of its rows that have just taken a seat
    num_preempted: int = 0  # requests that went back to the queue for it


class _Draft:
    """The rows of a step while it is put together, and what it still has room for."""

    def __init__(self, budget: int) -> None:
        self.rows: list[Row] = []
        self._tokens_left = budget
        self._logits_left = MAX_PROMPT_LOGITS

    def add(self, request: Request) -> bool:
        """Give ``request`` as many of its tokens as the step still takes; False if that is none."""
        start = request.num_computed_tokens
        new = min(request.num_tokens - start, self._tokens_left)
        logits = range(0)
        if request.params.prompt_logprobs:
            # The prompt's last position is sampled from; those before it have a successor to look up.
            first, last = max(start, request.num_prompt_logprobs), len(request.prompt_ids) - 1
            if first < last:
                new = min(new, first + self._logits_left - start)
            logits = range(first, min(start + new, last))
        if new == 0:
            return False
        self.rows.append(Row(request, start, new, start + new == request.num_tokens, logits))
        self._tokens_left -= new
        self._logits_left -= len(logits)
        return True


class Scheduler:
    """Queue, running requests and seats of one model.

    ``add`` requests; then ``schedule`` a step, run it, and ``update`` with its tokens, or ``fail`` it, or ``requeue``
    all when the agents have lost their caches.
    """

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self._budget = max_num_batched_tokens
        # No more rows than tokens: every decoding row gets its token, and a running prompt at least one.
        self._seats = list(range(min(max_num_seqs, max_num_batched_tokens)))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order of arrival, as is the queue behind it
        self._ending: list[Request] = []  # finished while their step is in flight
        self._in_flight: Step | None = None
        self._step_ids = count(1)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def unfinished(self) -> list[Request]:
        """All requests that have no finish reason yet, in the order of arrival."""
        return [*self._running, *self._waiting]

    def add(self, request: Request) -> None:
        """Queue a request. Prompt and answer together must fit the cache."""
        longest = len(request.prompt_ids) + request.max_new_tokens
        assert request.prompt_ids, "a prompt has at least one token"
        assert longest <= self.blocks.num_usable * self.blocks.block_size, "the request fits the cache alone"
        self._waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> bool:
        """End a request now; False if it has ended already. Its blocks are freed when no step in flight uses them."""
        if request.status is Status.FINISHED:
            return False
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            if self._in_flight is None:
                self._release(request)
            else:
                self._ending.append(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        return True

    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to do. The step before must be over."""
        assert self._in_flight is None, "one step at a time"
        num_preempted = self._give_blocks()
        draft = _Draft(self._budget)
        for request in sorted(self._running, key=_is_prompt):  # stable: each group in the order of arrival
            draft.add(request)
        admitted = self._admit(draft)
        if not draft.rows:
            return None
        self._in_flight = Step(next(self._step_ids), tuple(draft.rows), tuple(admitted), num_preempted)
        return self._in_flight

    def update(self, step: Step, token_ids: Sequence[int]) -> list[Request]:
        """The step is over: append the tokens of its sampled rows, in their order.

        Returns the requests that ended by it. Tokens of requests that ended while it ran are dropped.
        """
        assert step is self._in_flight, "the step that is over is the one in flight"
        self._in_flight = None
        sampled = (row for row in step.rows if row.samples)
        for row in step.rows:
            row.request.num_computed_tokens += row.num_new_tokens
            row.request.num_prompt_logprobs += len(row.prompt_logits)
        ended = []
        for row, token_id in zip(sampled, token_ids, strict=True):
            if row.request.status is Status.FINISHED:
                continue
            row.request.output_ids.append(token_id)
            reason = _finish_reason(row.request)
            if reason and self.finish(row.request, reason):
                ended.append(row.request)
        self._release_ending()
        return ended

    def fail(self, step: Step) -> list[Request]:
        """The step could not be run, or not be taken over: its requests end with an error, all others go on.

        Returns the requests that ended by it.
        """
        self._in_flight = None
        ended = [row.request for row in step.rows if self.finish(row.request, "error")]
        self._release_ending()
        return ended

    def requeue(self) -> None:
        """The caches are lost: every running request goes back to the queue, in order, to be recomputed."""
        self._in_flight = None
        while self._running:
            self._preempt(self._running[-1])
        self._release_ending()

    def check(self) -> None:
        """Assert that every block and every seat has exactly one owner, or none."""
        owners = [*self._running, *self._ending]
        self.blocks.check(request.block_table for request in owners)
        seats = sorted([*self._seats, *(request.seat for request in owners if request.seat is not None)])
        assert seats == list(range(len(seats))), "a seat is taken twice"
        assert len(seats) == len(self._seats) + len(owners), "a request runs without a seat"
        assert not any(request.block_table for request in self._waiting), "a waiting request owns blocks"

    def _give_blocks(self) -> int:
        """Give every running row the blocks of its tokens, after preempting as many rows as that takes."""
        served = num_preempted = 0
        while served < len(self._running):
            request = self._running[served]
            if self.blocks.grow(request.block_table, request.num_tokens):
                served += 1
            else:
                self._preempt(self._running[-1])
                num_preempted += 1
        return num_preempted

    def _admit(self, draft: _Draft) -> list[Request]:
        """Admit from the queue's head while budget, seats and blocks last."""
        admitted: list[Request] = []
        while self._waiting and self._seats:
            request = self._waiting[0]
            spare = self.blocks.num_free - self.blocks.missing(request.block_table, request.num_tokens)
            if spare < len(self._running) or not draft.add(request):
                break
            self._waiting.popleft()
            self.blocks.grow(request.block_table, request.num_tokens)
            request.seat = heapq.heappop(self._seats)
            request.status = Status.RUNNING
            self._running.append(request)
            admitted.append(request)
        return admitted

    def _preempt(self, request: Request) -> None:
        """Back to the queue's front. Latest first, so that the queue stays in the order of arrival."""
        self._running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._waiting.appendleft(request)

    def _release_ending(self) -> None:
        for request in self._ending:
            self._release(request)
        self._ending.clear()

    def _release(self, request: Request) -> None:
        assert request.seat is not None
        self.blocks.free(request.block_table)
        heapq.heappush(self._seats, request.seat)
        request.seat = None


def _is_prompt(request: Request) -> bool:
    """Whether more than the latest token is still to be computed."""
    return request.num_tokens - request.num_computed_tokens > 1


def _finish_reason(request: Request) -> FinishReason | None:
    """Whether the latest token ends the answer."""
    if request.output_ids[-1] in request.params.sampling.end_token_ids:
        return "stop"
    return "length" if len(request.output_ids) >= request.max_new_tokens else None
