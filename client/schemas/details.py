"""What an answer tells of itself beside its text: finish reason, seed, tokens with their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

from server.request import TokenLogprob
from server.request_stream import Increment, StopKind

FinishReason = Literal["length", "eos_token", "stop_sequence"]

FINISH_REASONS: dict[StopKind, FinishReason] = {
    "length": "length",
    "eos": "eos_token",
    "stop_token": "eos_token",
    "stop_string": "stop_sequence",
}


class PrefillToken(BaseModel):
    """One token of the prompt."""

    id: int
    text: str
    logprob: float | None = Field(description="null for the first token, which follows from nothing")


class Token(BaseModel):
    """One token of the answer, or one that might have stood there."""

    id: int
    text: str
    logprob: float | None
    special: bool = Field(description="leaves no trace in generated_text")


class Details(BaseModel):
    """How one answer came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int = Field(description="with the same seed, the same request has the same answer")
    prefill: list[PrefillToken] = Field(description="the prompt, if decoder_input_details asked for it")
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = Field(
        None, description="for each token the best of its step, best first; only if top_n_tokens asked for them"
    )

    def content(self) -> dict[str, Any]:
        """For JSON, without the fields that only some requests ask for."""
        return self.model_dump(exclude={"top_tokens"} if self.top_tokens is None else None)


def details_of(answer: Increment, seed: int, top_n_tokens: int, token: Callable[[int], tuple[str, bool]]) -> Details:
    """The details of a whole answer; ``token`` gives an id's text and whether it is special."""
    assert answer.stop_kind is not None, "a whole answer was ended by something"

    def best(tokens: TokenLogprob) -> list[Token]:
        return [_token(token_id, *token(token_id), logprob) for token_id, logprob in tokens.top[:top_n_tokens]]

    return Details(
        finish_reason=FINISH_REASONS[answer.stop_kind],
        generated_tokens=len(answer.tokens),
        seed=seed,
        prefill=[PrefillToken(id=t.token_id, text=t.text, logprob=t.logprob) for t in answer.prompt_tokens],
        tokens=[_token(t.token_id, t.text, t.special, t.logprob) for t in answer.tokens],
        top_tokens=[best(t) for t in answer.tokens] if top_n_tokens else None,
    )


def _token(token_id: int, text: str, special: bool, logprob: float | None) -> Token:
    return Token(id=token_id, text=text, special=special, logprob=logprob)
