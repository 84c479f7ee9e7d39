"""The bodies of Text Generation Inference: a prompt and its parameters, answers, stream events, what is served.

A parameter that is left out, or null, is off. Any of ``temperature``, ``top_k``, ``top_p`` and ``typical_p`` turns
sampling on, as ``do_sample`` does.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from client.schemas.answer_form import TgiGrammar, tgi_constraint
from client.schemas.details import Details, FinishReason, Token
from client.schemas.request_body import (
    MAX_TOKENS_FIELD,
    RequestBody,
    StopString,
    Unsupported,
    check_answers,
    check_limits,
    random_seed,
)
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import GenerationParams, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 100


Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]


class TgiParameters(RequestBody):
    """How to generate."""

    best_of: StrictInt | None = Field(
        None, ge=1, description="answer with the likeliest of so many; must sample, without a seed"
    )
    do_sample: StrictBool = Field(False, description="false: greedy, unless one of the next four fields is given")
    temperature: Number | None = Field(None, gt=0, le=100, description="above 0 and up to 100; left out: 1")
    top_k: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS_FIELD, description="keep the k most likely tokens")
    top_p: Number | None = Field(None, gt=0, le=1, description="keep the most likely tokens that hold this probability")
    typical_p: Number | None = Field(None, gt=0, le=1, description="locally typical sampling")
    repetition_penalty: Number | None = Field(
        None, ge=0.01, le=100, description="over prompt and answer, 0.01 … 100; 1: off"
    )
    frequency_penalty: Number | None = Field(None, ge=-2, le=2, description="over the answer, -2 … 2")
    max_new_tokens: StrictInt | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS_FIELD,
        description=f"at most what the context leaves; left out: {DEFAULT_MAX_NEW_TOKENS}, or what the context leaves",
    )
    stop: list[StopString] = Field([], description="texts that end the answer and are not part of it")
    seed: StrictInt | None = Field(None, ge=0, description="64 bits; left out: a random one")
    truncate: StrictInt | None = Field(
        None, ge=1, le=MAX_TOKENS_FIELD, description="keep this many tokens at the end of the prompt"
    )
    return_full_text: StrictBool = Field(False, description="put the prompt in front of generated_text")
    details: StrictBool = Field(False, description="say finish reason, seed and tokens with log-probabilities")
    decoder_input_details: StrictBool = Field(False, description="and those of the prompt; not in streams")
    top_n_tokens: StrictInt = Field(0, ge=0, description="in details and stream events: so many best tokens a step")
    watermark: Unsupported = Field(None, description="not supported: only false")
    adapter_id: Unsupported = Field(None, description="not supported: only null")
    grammar: TgiGrammar | None = Field(None, description="what form the answer must have")

    @property
    def wants_details(self) -> bool:
        """Whether a full answer carries ``details``."""
        return self.details or self.decoder_input_details

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: asked for, or implied by a field that only then has an effect."""
        chosen = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return self.do_sample or any(value is not None for value in chosen)

    def generation_params(self, limits: LimitsConfig, *, stream: bool) -> GenerationParams:
        """These parameters as the server takes them, with a seed drawn if none is given.

        Raises:
            InvalidRequest: beyond the deployment's limits, or fields contradict each other.
        """
        self._check(limits, stream)
        return GenerationParams(
            sampling=self._sampling(stream),
            max_new_tokens=self.max_new_tokens,
            default_max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
            stop=tuple(self.stop),
            truncate=self.truncate,
            prompt_logprobs=self.decoder_input_details,
            constraint=tgi_constraint(self.grammar) if self.grammar else None,
        )

    def _check(self, limits: LimitsConfig, stream: bool) -> None:
        check_limits(self.stop, self.top_n_tokens, self.seed, limits)
        if stream and self.decoder_input_details:
            raise InvalidRequest("cannot be had in a stream", "decoder_input_details")
        if self.best_of is None or self.best_of == 1:
            return
        if stream:
            raise InvalidRequest("must be 1 in a stream", "best_of")
        if not self.samples:
            raise InvalidRequest("above 1 needs do_sample: greedy answers are all the same", "best_of")
        if self.seed is not None:
            raise InvalidRequest("cannot be given with best_of above 1, whose answers have a seed each", "seed")
        check_answers(self.best_of, limits, "best_of")

    def _sampling(self, stream: bool) -> SamplingParams:
        greedy = SamplingParams(
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            seed=random_seed() if self.seed is None else self.seed,
            logprobs=stream or self.wants_details or (self.best_of or 1) > 1,
            top_logprobs=self.top_n_tokens if stream or self.wants_details else 0,
        )
        if not self.samples:
            return greedy
        return msgspec.structs.replace(
            greedy,
            temperature=_given(self.temperature, 1.0),
            top_k=self.top_k or 0,
            top_p=_given(self.top_p, 1.0),
            typical_p=_given(self.typical_p, 1.0),
        )


class TgiRequest(RequestBody):
    """A prompt and how to answer it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": "The sea is", "parameters": {"max_new_tokens": 20, "details": True}}]
        }
    )

    inputs: StrictStr = Field(min_length=1, description="the prompt, taken as it is")
    parameters: TgiParameters = TgiParameters()
    stream: StrictBool = Field(False, description="stream the answer; only POST / reads this")


class BestOfSequence(Details):
    """One of the other answers of ``best_of``."""

    generated_text: str


class TgiDetails(Details):
    """How an answer came about."""

    best_of_sequences: list[BestOfSequence] | None = Field(None, description="the others; only if best_of is above 1")


class TgiAnswer(BaseModel):
    """A full answer. ``details`` stands there only if asked for."""

    generated_text: str
    details: TgiDetails | None = None


class StreamDetails(BaseModel):
    """How a streamed answer came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int
    input_length: int = Field(description="tokens of the prompt")


class StreamEvent(BaseModel):
    """The data of one event of a stream, which is one token.

    The texts of the tokens that are not special, joined, are the generated text: a token has the text that it adds.
    """

    index: int = Field(description="from 1")
    token: Token
    top_tokens: list[Token] = Field(description="the best of this step, best first; empty unless top_n_tokens is given")
    generated_text: str | None = Field(description="the whole answer, in the last event")
    details: StreamDetails | None = Field(description="in the last event, if asked for")


class TgiInfo(BaseModel):
    """What answers on the routes that name no model, and what it takes."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: Literal["text-generation"]
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int = Field(description="of a prompt: the context without room for an answer's first token")
    max_total_tokens: int = Field(description="of prompt and answer together")
    validation_workers: int
    max_client_batch_size: int = Field(description="prompts of one request")
    router: str
    version: str
    sha: str | None
    docker_label: str | None


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
