"""One scheduled step: which requests take part, and with which of their tokens. Pure data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from server.request import Request

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
    admitted: tuple[Request, ...] = ()  # those of its rows that have just taken a seat
    block_copies: tuple[tuple[int, int], ...] = ()  # (from, to), made before it
    num_preempted: int = 0  # requests that went back to the queue for it

    @property
    def num_tokens(self) -> int:
        return sum(row.num_new_tokens for row in self.rows)


class Draft:
    """The rows of a step while it is put together, and what it still has room for."""

    def __init__(self, budget: int, *, chunks: bool) -> None:
        """``budget`` is in tokens; without ``chunks`` a prompt goes into one step or none."""
        self.rows: list[Row] = []
        self._tokens_left = budget
        self._logits_left = MAX_PROMPT_LOGITS
        self._chunks = chunks

    def add(self, request: Request) -> bool:
        """Give ``request`` as many of its tokens as the step still takes; False if that is none."""
        start, wanted = request.num_computed_tokens, request.num_uncomputed_tokens
        new = min(wanted, self._tokens_left)
        logits = range(0)
        if request.params.prompt_logprobs:
            # The prompt's last position is sampled from; those before it have a successor to look up.
            first, last = max(start, request.num_prompt_logprobs), len(request.prompt_ids) - 1
            if first + self._logits_left < last:
                new = min(new, first + self._logits_left - start)
            logits = range(first, min(start + new, last))
        if new <= 0 or (new < wanted and not self._chunks):
            return False
        self.rows.append(Row(request, start, new, new == wanted, logits))
        self._tokens_left -= new
        self._logits_left -= len(logits)
        return True

    def add_all(self, requests: Iterable[Request]) -> None:
        """Give each of ``requests`` what there is for it."""
        for request in requests:
            self.add(request)
