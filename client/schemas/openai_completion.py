"""``POST /v1/completions``: the request, its answer, the chunks of its stream."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from client.schemas.openai_generation import FinishReason, GenerationBody, ServiceTier, TokenId, Usage
from client.schemas.request_body import MAX_TOKENS_FIELD
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import GenerationParams

DEFAULT_MAX_TOKENS = 16

Prompt = Annotated[StrictStr, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[Prompt], Field(min_length=1)]


def _as_prompts(value: object) -> list[object]:
    """One prompt, a text or token ids, as a list of one."""
    prompts = value if isinstance(value, list) and not _are_ids(value) else [value]
    if not all(isinstance(prompt, str) or _are_ids(prompt) for prompt in prompts):
        message = "must be a text, a list of token ids (whole numbers from 0), or a list of texts or such lists"
        raise PydanticCustomError("prompt", message)
    return prompts


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int and part >= 0 for part in value)


class CompletionRequest(GenerationBody):
    """One prompt or several, and how to go on."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "llama2", "prompt": "The sea is", "max_tokens": 20, "temperature": 0}]
        }
    )

    prompt: Annotated[Prompts, BeforeValidator(_as_prompts, json_schema_input_type=Prompt | Prompts)] = Field(
        description="texts or lists of token ids, taken as they are"
    )
    max_tokens: StrictInt | None = Field(
        None,
        ge=0,
        le=MAX_TOKENS_FIELD,
        description=f"left out: {DEFAULT_MAX_TOKENS}, or what the context leaves; 0 only with echo",
    )
    echo: StrictBool = Field(False, description="put the prompt in front; with logprobs, its tokens too")
    logprobs: StrictInt | None = Field(None, ge=0, description="tell so many likeliest tokens beside each chosen one")
    best_of: StrictInt | None = Field(None, ge=1, description="only what n is")
    add_special_tokens: StrictBool = Field(
        True, description="a text prompt gets the model's begin token, if it has one"
    )

    @property
    def only_prompt(self) -> bool:
        """Whether nothing but the prompt is wanted, for its log-probabilities."""
        return self.max_tokens == 0

    def generation_params(self, limits: LimitsConfig) -> GenerationParams:
        """These parameters as the server takes them, with a seed drawn if none is given.

        Raises:
            InvalidRequest: beyond the deployment's limits, or fields contradict each other.
        """
        self._check(limits, self.logprobs or 0, None if self.only_prompt else self.max_tokens, len(self.prompt))
        if self.best_of not in (None, self.n):
            raise InvalidRequest("must be what n is: this server does not choose among answers", "best_of")
        if self.only_prompt and not self.echo:
            raise InvalidRequest("must be at least 1, unless echo asks for the prompt", "max_tokens")
        scored = self.echo and self.logprobs is not None
        return GenerationParams(
            sampling=self._sampling(self.logprobs),
            max_new_tokens=1 if self.only_prompt else self.max_tokens,  # a prompt is run to have a next token
            default_max_new_tokens=DEFAULT_MAX_TOKENS,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            add_special_tokens=self.add_special_tokens,
            priority=self.priority,
            cache_salt=self.cache_salt,
            constraint=self.constraint(),
            prompt_logprobs=scored,
            prompt_top_logprobs=(self.logprobs or 0) if scored else 0,
        )


class CompletionLogprobs(BaseModel):
    """Tokens of a text with the log-softmax of the model's raw logits; all four lists are of the same length."""

    tokens: list[str] = Field(description="a token that is no text of its own: bytes: and its bytes")
    token_logprobs: list[float | None] = Field(
        description="null for a prompt's first token, which follows from nothing"
    )
    top_logprobs: list[dict[str, float] | None] = Field(description="the likeliest tokens, and the chosen one")
    text_offset: list[int] = Field(description="characters of the text before the token")


class CompletionChoice(BaseModel):
    index: int = Field(description="answers to the first prompt come first")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Whole answers."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    service_tier: ServiceTier = None


class CompletionChunkChoice(BaseModel):
    index: int
    text: str = Field(description="of this step")
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None = Field(description="in the last chunk of this choice")


class CompletionChunk(BaseModel):
    """The data of one event of a stream. After the last one comes ``[DONE]``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice] = Field(description="one; none in the chunk with the usage")
    usage: Usage | None = Field(None, description="only if asked for: null, and in the last chunk the usage")
    service_tier: ServiceTier = None
