"""One request, from its parameters to its finish reason. Pure: no clock, no sockets, no asyncio."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from agent.protocol import SamplingParams as SamplingParams  # for client too, which does not know agents
from server.prefix_keys import PrefixKeys

PRIORITY_SECONDS = 10.0  # what a step of priority is worth, so that nobody waits for ever

ConstraintKind = Literal["json_schema", "regex", "choice", "grammar", "tool_calls"]
FinishReason = Literal["stop", "length", "abort", "error"]


class Status(Enum):
    WAITING = "waiting"  # in the queue, for the first time or preempted
    RUNNING = "running"  # has a seat and blocks
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What an answer must be: JSON of a schema, a text that a regular expression or a grammar describes, a choice, or
    text and calls of tools (``server.tool_calls``)."""

    kind: ConstraintKind
    value: Any  # json_schema and tool_calls: an object; choice: a list of texts, at least one; else a text
    field: str  # of the request, for errors


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """What a client asked for, validated once at the edge.

    ``sampling`` goes to the agent; ``LLMServer.submit`` fills its ``end_token_ids`` and ``grammar``. The rest is kept
    by the server.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None  # refused beyond what the context leaves
    default_max_new_tokens: int | None = None  # if max_new_tokens is None; cut to what the context leaves, as is None
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    add_special_tokens: bool = True  # a text prompt gets the model's begin token if the model has that rule
    truncate: int | None = None  # keep only this many tokens at the prompt's end
    priority: int = 0  # each step down is served as if it had arrived ``PRIORITY_SECONDS`` earlier
    cache_salt: str | None = None  # shares cached prefixes only with requests that name the same
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    constraint: Constraint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token with its log-probability (log-softmax of the raw logits), and the best tokens of its position."""

    token_id: int
    text: str  # the token's own; U+FFFD where it is only a part of a character
    special: bool  # leaves no trace in the answer's text
    logprob: float | None  # None: the first token of a prompt, or not asked for
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


@dataclass(eq=False, kw_only=True)
class Request:
    """A request in the scheduler. ``prompt_ids`` and ``output_ids`` only ever grow at the end.

    ``num_computed_tokens`` counts, from the front of prompt and answer, the tokens whose keys and values are in the
    cache when the steps in flight are over. Such a step may also bring tokens of the answer that nobody here knows yet:
    ``num_pending_tokens``.
    """

    request_id: str
    prompt_ids: list[int]
    params: GenerationParams
    arrival: float  # seconds, of the caller's clock
    max_new_tokens: int
    leader: Request | None = None  # another answer to the same prompt, queued before this one
    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    order: tuple[float, int] = (0.0, 0)  # who is served first; set by the scheduler, as is the next
    prefix_keys: PrefixKeys | None = None  # made when they are first asked for
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_in_flight: int = 0  # steps that it takes part in and that are not over
    num_cached_tokens: int = 0  # of the prompt, found in the cache when the request was first admitted
    num_prompt_logprobs: int = 0  # answered so far, from the prompt's second token on
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    seat: int | None = None
    num_admissions: int = 0
    num_preemptions: int = 0
    num_crashes: int = 0  # of agents while it was in flight, since its latest token

    @property
    def num_tokens(self) -> int:
        """Known tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the next step may take, the pending one included; none after the answer's last."""
        answered = len(self.output_ids) + self.num_pending_tokens
        if answered >= self.max_new_tokens:
            return 0
        return len(self.prompt_ids) + answered - self.num_computed_tokens

    @property
    def prompt_is_computed(self) -> bool:
        """Whether the steps so far write the whole prompt's keys and values."""
        return self.status is Status.RUNNING and self.num_computed_tokens >= len(self.prompt_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """The known tokens of prompt and answer from ``start`` to ``end``, without copying the rest."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : end - split]
        return self.prompt_ids[start:end] if end <= split else self.prompt_ids[start:] + self.output_ids[: end - split]
