"""One request, from its parameters to its finish reason. Pure: no clock, no sockets, no asyncio."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from agent.protocol import SamplingParams as SamplingParams  # for client too, which does not know agents

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(Enum):
    WAITING = "waiting"  # in the queue, for the first time or preempted
    RUNNING = "running"  # has a seat and blocks
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """What a client asked for, validated once at the edge.

    ``sampling`` goes to the agent; ``LLMServer.submit`` fills its ``end_token_ids``. The rest is kept by the server.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None  # refused beyond what the context leaves
    default_max_new_tokens: int | None = None  # if max_new_tokens is None; cut to what the context leaves, as is None
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    add_special_tokens: bool = True  # a text prompt gets the model's begin token if the model has that rule
    truncate: int | None = None  # keep only this many tokens at the prompt's end
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    priority: int = 0
    cache_salt: str | None = None


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

    Tokens whose keys and values are in the cache: ``num_computed_tokens``, from the front of prompt + output.
    """

    request_id: str
    prompt_ids: list[int]
    params: GenerationParams
    arrival: float  # seconds, of the caller's clock
    max_new_tokens: int
    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the cache when the request was first admitted
    num_prompt_logprobs: int = 0  # answered so far, from the prompt's second token on
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    seat: int | None = None
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)
