"""What the completions and chat requests of the OpenAI protocol have in common, and what all their answers tell.

The defaults are OpenAI's: temperature 1, top_p 1, nothing else. Fields that OpenAI does not have are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from client.schemas.answer_form import FormedBody
from client.schemas.request_body import (
    MAX_TOKENS_FIELD,
    Only,
    RequestBody,
    StopString,
    Unsupported,
    check_answers,
    check_limits,
    random_seed,
)
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import SamplingParams

MAX_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_SALT_CHARACTERS = 256
MAX_PRIORITY = 100

FinishReason = Literal["stop", "length"]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100)]
TokenId = Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS_FIELD)]
TokenIdText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[StopString], BeforeValidator(_as_list, json_schema_input_type=StopString | list[StopString])
]


class StreamOptions(RequestBody):
    """What a stream tells beside the answer."""

    include_usage: StrictBool = Field(False, description="one more chunk at the end, with usage and no choices")


class GenerationBody(FormedBody):
    """How to generate, whatever the prompt is."""

    model: StrictStr = Field(description="a served name")
    stream: StrictBool = Field(False, description="the answer as server-sent events, as it comes")
    stream_options: StreamOptions | None = Field(None, description="only in a stream")
    n: StrictInt = Field(1, ge=1, description="answers to each prompt; answer i draws with seed + i")
    temperature: Number = Field(1.0, ge=0, le=100, description="0: greedy")
    top_p: Number = Field(1.0, gt=0, le=1, description="keep the most likely tokens that hold this probability; 1: off")
    top_k: StrictInt = Field(0, ge=-1, le=MAX_TOKENS_FIELD, description="keep the k most likely tokens; 0, -1: off")
    min_p: Number = Field(0.0, ge=0, le=1, description="keep tokens this likely, relative to the likeliest; 0: off")
    typical_p: Number = Field(1.0, gt=0, le=1, description="locally typical sampling; 1: off")
    frequency_penalty: Number = Field(0.0, ge=-2, le=2, description="over the answer")
    presence_penalty: Number = Field(0.0, ge=-2, le=2, description="over the answer")
    repetition_penalty: Number = Field(1.0, ge=0.01, le=100, description="over prompt and answer; 1: off")
    logit_bias: dict[TokenIdText, Bias] = Field(
        {}, max_length=MAX_BIASES, description="by token id, what is added to its logit; -100 bans it"
    )
    seed: StrictInt | None = Field(None, ge=-(2**63), description="64 bits; left out: a random one")
    stop: StopStrings = Field([], description="a text or several that end the answer and are not part of it")
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_TOKENS, description="tokens that end the answer")
    ignore_eos: StrictBool = Field(False, description="go on past the model's end tokens")
    min_tokens: StrictInt = Field(0, ge=0, le=MAX_TOKENS_FIELD, description="no end token before this many")
    priority: StrictInt = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="the lower, the sooner")
    cache_salt: StrictStr | None = Field(
        None, min_length=1, max_length=MAX_SALT_CHARACTERS, description="share cached prompts only under this name"
    )
    user: StrictStr | None = Field(None, description="taken, and not used")
    safety_identifier: StrictStr | None = Field(None, description="taken, and not used")
    prompt_cache_key: StrictStr | None = Field(None, description="taken, and not used: cached prompts are found anyway")
    prompt_cache_retention: Annotated[str, Only("in_memory", "in-memory")] | None = Field(
        None, description="prompts are cached in memory"
    )
    metadata: dict[str, Any] | None = Field(None, description="taken, and not used")
    store: Unsupported = Field(None, description="answers are not stored: only false")
    service_tier: Annotated[str, Only("auto", "default")] | None = Field(
        None, description="there is one; if asked for, the answer says so"
    )
    skip_special_tokens: Annotated[bool, Only(True)] = Field(True, description="they leave no trace in the text")
    spaces_between_special_tokens: Annotated[bool, Only(True)] = Field(True, description="of no effect, as they do not")

    @property
    def include_usage(self) -> bool:
        """Whether a stream has a chunk with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _check(self, limits: LimitsConfig, top: int, max_tokens: int | None, prompts: int = 1) -> None:
        """``top``: how many likeliest tokens the answer shows.

        Raises:
            InvalidRequest: beyond the deployment's limits, or fields contradict each other.
        """
        check_answers(prompts * self.n, limits, "n" if self.n > 1 else "prompt")
        check_limits(self.stop, top, self.seed, limits)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("can only be given in a stream", "stream_options")
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise InvalidRequest(f"is more than the {max_tokens} tokens that the answer may have", "min_tokens")

    def _sampling(self, logprobs: int | None) -> SamplingParams:
        """``logprobs``: None, or how many likeliest tokens are told beside the chosen one."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            typical_p=self.typical_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self._biases(),
            seed=random_seed() if self.seed is None else self.seed,
            min_new_tokens=self.min_tokens,
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
        )

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = {int(token): bias for token, bias in self.logit_bias.items()}
        if len(biases) < len(self.logit_bias):
            raise InvalidRequest("names a token twice", "logit_bias")
        return tuple(biases.items())


# Of answers and chunks.
ServiceTier = Annotated[Literal["default"] | None, Field(description="only if the request names one")]


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="tokens of the prompt that were in the cache already")


class Usage(BaseModel):
    """Tokens of a request: each prompt counts once, each answer counts, end tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
