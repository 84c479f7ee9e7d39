"""The policy: which requests take part in the next step, and with how many tokens.

Pure: no clock, no sockets, no asyncio, so it can be read in one go and tested without processes. The rules:

- Requests are served in the order of ``Request.order``: of their arrival, moved by their priority. Nobody is overtaken:
  a queue that cannot serve its head waits.
- A step's token budget goes to decoding rows first (one token each), then to running prompts, then to the queue's head.
  A prompt beyond the budget is cut into chunks, so a long prompt never stalls running answers by more than one step.
- A request is admitted when a seat is free and its whole prompt has blocks, with ``SPARE_BLOCKS`` to spare for each
  running row, so that the admission does not lead to a preemption a few tokens later. It takes over the blocks that
  hold the begin of its prompt already; the answers to one prompt share its blocks, and copy the last one, which each
  goes on to fill.
- When a running row needs a block and none is free, the last in the order is preempted: it gives up seat and blocks,
  keeps its answer so far and goes back to the queue, to be recomputed. Whoever was preempted ``MAX_PREEMPTIONS`` times
  comes back only when its whole answer has room, and stays. So the others always go on, and nobody is dropped.
- While a step is in flight, the next one may be planned: rows that get a token in the first take part in the second
  without anybody here knowing the token. The agents run steps in order, so what a request gives up is free at once.
- Graphs that cannot cut prompts, or not mix them with decoding rows, get steps of one kind, the two in turns.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter

from server.block_manager import BlockManager
from server.dispatcher import Load
from server.prefix_keys import PrefixKeys
from server.request import PRIORITY_SECONDS, FinishReason, Request, Status
from server.step import MAX_PROMPT_LOGITS, Draft, Row, Step
from server.trials import Trials

MAX_IN_FLIGHT = 2  # steps: one that the agents run, and the next
MAX_PREEMPTIONS = 3  # of one request
SPARE_BLOCKS = 2  # docs/scheduling.md says why

_in_order = attrgetter("order")


@dataclass
class Prefix:
    """What a request finds in the cache: blocks to share, one to copy, and how many of its tokens that makes."""

    shared: list[int] = field(default_factory=list)
    copied: int | None = None
    num_tokens: int = 0


class Scheduler:
    """Queue, running requests and seats of one model.

    ``add`` requests; then ``schedule`` a step, run it, and ``update`` with its tokens, in the order of the steps; or
    ``fail`` when the agents could not run one, or ``requeue`` all when they have lost their caches.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        salt: bytes = b"",
        prefix_caching: bool = True,
        chunks: bool = True,
        mixed: bool = True,
        spare_blocks: int = SPARE_BLOCKS,
    ) -> None:
        """``salt`` keeps the keys of known prefixes secret; all schedulers of a model have the same.

        What the graphs can do: ``chunks`` of prompts after what is cached, prompts and decoding rows ``mixed``. An
        admission leaves ``spare_blocks`` for each running row.
        """
        self.blocks = blocks
        self._budget = max_num_batched_tokens
        # No more rows than tokens: every decoding row gets its token, and a running prompt at least one.
        self._num_seats = min(max_num_seqs, max_num_batched_tokens)
        self._seats = list(range(self._num_seats))
        self._salt = salt
        self._prefix_caching = prefix_caching and chunks
        self._chunks = chunks
        self._mixed = mixed
        self._spare_blocks = spare_blocks
        self._prompts_last = False  # the step before was of prompts; of graphs that do not mix
        self._waiting: list[Request] = []  # in order, as are those that run
        self._running: list[Request] = []
        self._in_flight: list[Step] = []
        self._trials = Trials()
        self._step_ids = count(1)
        self._numbers = count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps that are not over."""
        return len(self._in_flight)

    @property
    def unfinished(self) -> list[Request]:
        """All requests that have no finish reason yet."""
        return [*self._running, *self._waiting]

    def add(self, request: Request) -> None:
        """Queue a request. Prompt and answer together must fit the cache.

        If prompts cannot be cut, they must fit a step as well, and so must the positions that are to be scored.
        """
        longest = len(request.prompt_ids) + request.max_new_tokens
        assert request.prompt_ids, "a prompt has at least one token"
        assert longest <= self.blocks.num_usable * self.blocks.block_size, "the request fits the cache alone"
        assert self._chunks or longest <= self._budget, "the request fits a step"
        scored = len(request.prompt_ids) - 1 if request.params.prompt_logprobs else 0
        assert self._chunks or scored <= MAX_PROMPT_LOGITS, "its prompt is scored in one step"
        rank = request.arrival + request.params.priority * PRIORITY_SECONDS
        request.order = rank, next(self._numbers)
        insort(self._waiting, request, key=_in_order)
        self._trials.suspect(request)

    def remove(self, request: Request) -> None:
        """Let another scheduler have a request that waits and takes part in no step; its answer so far goes along."""
        assert request.status is Status.WAITING, "nothing here is the request's"
        assert not request.num_in_flight, "no token is on the way to it"
        self._waiting.remove(request)
        self._trials.dismiss(request)
        request.leader = None  # whose blocks are of this cache

    def load(self, request: Request) -> Load:
        """How things stand here for a request that might be added."""
        return Load(
            num_requests=self.num_waiting + self.num_running,
            num_tokens=sum(other.num_uncomputed_tokens for other in self.unfinished),
            num_known_tokens=self._known_prefix(request).num_tokens,
        )

    def finish(self, request: Request, reason: FinishReason) -> bool:
        """End a request now; False if it has ended already. Its seat and blocks are free at once."""
        if request.status is Status.FINISHED:
            return False
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        return True

    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to do before the steps in flight are over."""
        suspects = self._trials.group
        if len(self._in_flight) >= (1 if suspects else MAX_IN_FLIGHT):
            return None
        num_preempted = self._give_blocks(_among(self._running, suspects))
        draft = Draft(self._budget, chunks=self._chunks)
        admitted, copies = self._fill(draft, suspects)
        if not draft.rows:
            return None
        step = Step(next(self._step_ids), tuple(draft.rows), tuple(admitted), tuple(copies), num_preempted)
        for row in step.rows:
            row.request.num_computed_tokens += row.num_new_tokens
            row.request.num_pending_tokens += row.samples
            row.request.num_in_flight += 1
        self._in_flight.append(step)
        return step

    def update(self, step: Step, token_ids: Sequence[int]) -> list[Request]:
        """The oldest step is over: append the tokens of its sampled rows, in their order.

        Returns the requests that ended by it. Tokens of requests that have ended meanwhile are dropped.

        Raises:
            ValueError: there are not as many tokens; nothing has changed.
        """
        assert step is self._in_flight[0], "the step that is over is the oldest in flight"
        sampled = [row.request for row in step.rows if row.samples]
        if len(token_ids) != len(sampled):
            raise ValueError(f"step {step.step_id} has {len(sampled)} sampled rows, and {len(token_ids)} tokens came")
        del self._in_flight[0]
        for row in step.rows:
            row.request.num_in_flight -= 1
            row.request.num_prompt_logprobs += len(row.prompt_logits)
            self._remember(row)
        ended = []
        for request, token_id in zip(sampled, token_ids, strict=True):
            if request.status is Status.FINISHED:
                continue
            request.output_ids.append(token_id)
            request.num_pending_tokens -= 1
            self._trials.passed(request)
            reason = _finish_reason(request)
            if reason and self.finish(request, reason):
                ended.append(request)
        return ended

    def fail(self, step: Step) -> list[Request]:
        """The agents could not run the oldest step; what follows in flight counts for nothing either.

        All requests of these steps are recomputed. Those of the failed one are tried in smaller and smaller groups,
        until the one that fails alone ends with an error. Returns the requests that ended now.
        """
        assert step is self._in_flight[0], "the step that fails is the oldest in flight"
        involved = self._withdraw_in_flight()
        suspects = [row.request for row in step.rows if row.request in involved]
        if len(step.rows) > 1:
            self._trials.split(suspects)
            return []
        return [culprit for culprit in suspects if self.finish(culprit, "error")]

    def requeue(self, *, crashed: bool) -> list[Request]:
        """The caches are lost: every running request goes back to the queue, to be recomputed.

        ``crashed``: one of the requests in flight may be the reason. Returns those that ended with an error, since it
        was their last try.
        """
        involved = self._withdraw_in_flight()
        while self._running:
            self._withdraw(self._running[-1])
        self.blocks.forget()
        for request in self._waiting:
            request.leader = None  # has no blocks to share any more, and may go on elsewhere
        guilty = self._trials.crashed(involved) if crashed else []
        return [request for request in guilty if self.finish(request, "error")]

    def check_idle(self) -> None:
        """Assert that nothing is owned when nothing is left to do, at a cost that does not grow with the cache."""
        assert not self.unfinished, "a request is left, and no step for it"
        assert self.blocks.num_used == 0, "a block is lost, or free twice"
        assert len(set(self._seats)) == self._num_seats, "a seat is lost or free twice"

    def check(self) -> None:
        """Assert that every block and every seat has its owners and no others, and that the order is kept."""
        self.blocks.check(request.block_table for request in self._running)
        taken = [request.seat for request in self._running if request.seat is not None]
        assert len(taken) == len(self._running), "a request runs without a seat"
        assert sorted([*self._seats, *taken]) == list(range(len(self._seats) + len(taken))), (
            "a seat is lost or taken twice"
        )
        assert not any(request.block_table for request in self._waiting), "a waiting request owns blocks"
        for requests in (self._waiting, self._running):
            assert requests == sorted(requests, key=_in_order), "a request is out of order"

    def _fill(self, draft: Draft, suspects: Sequence[Request]) -> tuple[list[Request], list[tuple[int, int]]]:
        """Put the rows together: who was admitted, and the blocks to copy for them."""
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in _among(self._running, suspects):
            if num_tokens := request.num_uncomputed_tokens:
                (decoding if num_tokens == 1 else prompts).append(request)
        if self._mixed or self._prompts_last:
            draft.add_all(decoding)
        self._prompts_last = False
        if draft.rows and not self._mixed:
            return [], []
        draft.add_all(prompts)
        admitted, copies = self._admit(draft, suspects)
        if draft.rows:
            self._prompts_last = not self._mixed
        else:
            draft.add_all(decoding)
        return admitted, copies

    def _give_blocks(self, requests: Sequence[Request]) -> int:
        """Give these running rows the blocks of their next tokens; how many rows were preempted for that."""
        num_preempted = 0
        for request in requests:
            num_tokens = request.num_computed_tokens + request.num_uncomputed_tokens
            while request.status is Status.RUNNING and not self.blocks.grow(request.block_table, num_tokens):
                self._preempt(self._last_to_preempt())
                num_preempted += 1
        return num_preempted

    def _admit(self, draft: Draft, suspects: Sequence[Request]) -> tuple[list[Request], list[tuple[int, int]]]:
        """Admit from the queue's head while budget, seats and blocks last: who, and the blocks to copy for them."""
        admitted: list[Request] = []
        copies: list[tuple[int, int]] = []
        for request in _among(self._waiting, suspects):
            leader = request.leader if not suspects else None
            if request.num_in_flight or (leader and leader.status is Status.RUNNING and not leader.prompt_is_computed):
                break
            prefix = self._find_room(request, suspects)
            if prefix is None:
                break
            request.num_computed_tokens = prefix.num_tokens
            if not draft.add(request):
                request.num_computed_tokens = 0
                break
            self._take_seat(request, prefix)
            if prefix.copied is not None:
                copies.append((prefix.copied, request.block_table[len(prefix.shared)]))
            admitted.append(request)
        return admitted, copies

    def _find_room(self, request: Request, suspects: Sequence[Request]) -> Prefix | None:
        """What ``request`` can begin with if there is a seat, and blocks with some to spare for each running row.

        Where suspects run apart, the others make room.
        """
        others = [other for other in self._running if other not in suspects] if suspects else []
        while True:
            prefix = self._known_prefix(request)
            spare = self.blocks.spare(prefix.shared, self._num_reserved(request))
            if self._seats and spare >= self._spare_blocks * (len(self._running) - len(others)):
                return prefix
            if not others:
                return None
            self._withdraw(others.pop())

    def _take_seat(self, request: Request, prefix: Prefix) -> None:
        self._waiting.remove(request)
        self.blocks.share(request.block_table, prefix.shared)
        self.blocks.grow(request.block_table, self._num_reserved(request))
        request.seat = heapq.heappop(self._seats)
        request.status = Status.RUNNING
        if not request.num_admissions:
            request.num_cached_tokens = prefix.num_tokens
        request.num_admissions += 1
        insort(self._running, request, key=_in_order)

    def _num_reserved(self, request: Request) -> int:
        """Tokens that get blocks at the admission: those there are or, after too many preemptions, all there may be."""
        if request.num_preemptions < MAX_PREEMPTIONS:
            return request.num_tokens
        return len(request.prompt_ids) + request.max_new_tokens

    def _known_prefix(self, request: Request) -> Prefix:
        """What the cache holds of a request's begin; at least one of its tokens is always left to compute."""
        if not self._chunks or request.params.prompt_logprobs:
            return Prefix()
        size = self.blocks.block_size
        if (leader := request.leader) and leader.prompt_is_computed:
            num_tokens = len(request.prompt_ids) - 1
            full, rest = divmod(num_tokens, size)
            return Prefix(leader.block_table[:full], leader.block_table[full] if rest else None, num_tokens)
        if not self._prefix_caching:
            return Prefix()
        shared = self.blocks.known(self._keys(request).first((request.num_tokens - 1) // size, request.tokens))
        return Prefix(shared, None, len(shared) * size)

    def _keys(self, request: Request) -> PrefixKeys:
        if request.prefix_keys is None:
            request.prefix_keys = PrefixKeys(self.blocks.block_size, self._salt, request.params.cache_salt)
        return request.prefix_keys

    def _remember(self, row: Row) -> None:
        """The cache now holds the row's tokens: make the blocks known that they have filled."""
        request, size = row.request, self.blocks.block_size
        first, end = row.start // size, (row.start + row.num_new_tokens) // size
        if self._prefix_caching and first < end and request.status is Status.RUNNING:
            keys = self._keys(request).first(end, request.tokens)
            for index in range(first, end):
                self.blocks.remember(request.block_table[index], keys[index])

    def _last_to_preempt(self) -> Request:
        """The last in the order that may still be preempted.

        There is one: the row that needs a block, as reserved rows need none.
        """
        return next(request for request in reversed(self._running) if request.num_preemptions < MAX_PREEMPTIONS)

    def _preempt(self, request: Request) -> None:
        request.num_preemptions += 1
        self._withdraw(request)

    def _withdraw(self, request: Request) -> None:
        """Back to the queue, to be recomputed. A token that is being sampled for it still comes."""
        self._running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        insort(self._waiting, request, key=_in_order)

    def _withdraw_in_flight(self) -> list[Request]:
        """Nothing comes of the steps in flight any more: their unfinished requests, all in the queue now."""
        rows = [row.request for step in self._in_flight for row in step.rows]
        involved = [request for request in dict.fromkeys(rows) if request.status is not Status.FINISHED]
        self._in_flight.clear()
        for request in involved:
            request.num_pending_tokens = request.num_in_flight = 0
            if request.status is Status.RUNNING:
                self._withdraw(request)
        return involved

    def _release(self, request: Request) -> None:
        assert request.seat is not None, "a running request has a seat"
        self.blocks.free(request.block_table)
        heapq.heappush(self._seats, request.seat)
        request.seat = None


def _among(requests: Sequence[Request], suspects: Sequence[Request]) -> list[Request]:
    """Those of ``requests`` that may run now, in order."""
    return [request for request in requests if request in suspects] if suspects else list(requests)


def _finish_reason(request: Request) -> FinishReason | None:
    """Whether the latest token ends the answer."""
    if request.output_ids[-1] in request.params.sampling.end_token_ids:
        return "stop"
    return "length" if len(request.output_ids) >= request.max_new_tokens else None
