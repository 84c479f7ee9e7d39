"""The request body of ``POST /models/M``, as the clients of the older system send it.

Booleans also arrive as ``"True"`` and ``"False"``, numbers as ``"0.8"``; null means the default. Out of range is
refused, but for the two fields that the older system clamps (``_clamp_top_k``, ``_clamp_top_p``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from client.schemas.details import Details
from client.schemas.request_body import (
    MAX_TOKENS_FIELD,
    RequestBody,
    StopString,
    check_limits,
    random_seed,
)
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import GenerationParams, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 300
HARMLESS_VALUES = {"best_of": 1}  # of a related protocol, whose clients send it along

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?")
_FLAGS = {"true": True, "false": False}


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _FLAGS:
        return _FLAGS[value.lower()]
    raise PydanticCustomError("flag", 'must be true or false (or "True" or "False")')


def _number(value: object) -> float | int:
    """A finite number, also from its text; a boolean is none."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        text = value.strip()
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite", "must be a finite number")
    return value


def _real(value: object) -> float:
    try:
        return float(_number(value))
    except OverflowError:
        raise PydanticCustomError("finite", "must be a finite number") from None


def _integer(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise PydanticCustomError("integer", "must be a whole number")
    return int(number)


def _clamp_top_k(value: int) -> int:
    return max(value, 0)


def _clamp_top_p(value: float) -> float:
    return min(max(value, 0.01), 1.0)


Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool | str)]
Integer = Annotated[int, BeforeValidator(_integer, json_schema_input_type=int | str)]
Real = Annotated[float, BeforeValidator(_real, json_schema_input_type=float | str)]


class LegacyParameters(RequestBody):
    """How to generate. Every field may be missing or null."""

    harmless_values: ClassVar[Mapping[str, int]] = HARMLESS_VALUES

    do_sample: Flag = Field(False, description="false: greedy; temperature, top_k, top_p and typical_p have no effect")
    top_k: Annotated[Integer, AfterValidator(_clamp_top_k), Field(le=MAX_TOKENS_FIELD)] = Field(
        3, description="keep the k most likely tokens; 0: off; a negative value is taken as 0"
    )
    top_p: Annotated[Real, AfterValidator(_clamp_top_p)] = Field(
        1.0, description="keep the most likely tokens that hold this much probability; taken into 0.01 … 1"
    )
    temperature: Real = Field(1.0, ge=0, le=100, description="0 … 100; 0: greedy")
    typical_p: Real = Field(1.0, gt=0, le=1, description="locally typical sampling, above 0 and up to 1; 1: off")
    repetition_penalty: Real = Field(1.0, ge=0.01, le=100, description="over prompt and answer, 0.01 … 100; 1: off")
    frequency_penalty: Real = Field(0.0, ge=-2, le=2, description="over the answer, -2 … 2")
    presence_penalty: Real = Field(0.0, ge=-2, le=2, description="over the answer, -2 … 2")
    max_new_tokens: Integer | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS_FIELD,
        description=f"at most what the context leaves; left out: {DEFAULT_MAX_NEW_TOKENS}, or what the context leaves",
    )
    min_new_tokens: Integer = Field(0, ge=0, description="no end token before this many; at most max_new_tokens")
    ignore_eos: Flag = Field(False, description="go on past the model's end tokens")
    stop: list[StopString] = Field([], description="texts that end the answer and are not part of it")
    seed: Integer | None = Field(None, ge=0, description="64 bits; left out: a random one")
    truncate: Integer | None = Field(
        None, ge=1, le=MAX_TOKENS_FIELD, description="keep this many tokens at the end of the prompt"
    )
    return_full_text: Flag = Field(True, description="streams end with one more event that holds the whole answer")
    return_protocol: str = Field("sse", description='of streams: "sse", or anything else for lines "data:{…}"')
    details: Flag = Field(False, description="add details: finish reason, seed and tokens with log-probabilities")
    decoder_input_details: Flag = Field(False, description="add details, with the prompt's tokens among them")
    top_n_tokens: Integer = Field(0, ge=0, description="add details, with this many best tokens of each step")

    @property
    def wants_details(self) -> bool:
        """Whether the answer carries ``details``: asked for, or asked for something that only they hold."""
        return self.details or self.decoder_input_details or self.top_n_tokens > 0

    def generation_params(self, limits: LimitsConfig) -> GenerationParams:
        """These parameters as the server takes them, with a seed drawn if none is given.

        Raises:
            InvalidRequest: beyond the deployment's limits, or two fields contradict each other.
        """
        self._check(limits)
        return GenerationParams(
            sampling=self._sampling(),
            max_new_tokens=self.max_new_tokens,
            default_max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            truncate=self.truncate,
            prompt_logprobs=self.decoder_input_details,
        )

    def _check(self, limits: LimitsConfig) -> None:
        check_limits(self.stop, self.top_n_tokens, self.seed, limits)
        most = DEFAULT_MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        if self.min_new_tokens > most:
            raise InvalidRequest(f"must be at most max_new_tokens, which is {most}", "min_new_tokens")

    def _sampling(self) -> SamplingParams:
        greedy = SamplingParams(
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=random_seed() if self.seed is None else self.seed,
            min_new_tokens=self.min_new_tokens,
            logprobs=self.wants_details,
            top_logprobs=self.top_n_tokens,
        )
        if not self.do_sample or self.temperature == 0:
            return greedy
        return msgspec.structs.replace(
            greedy, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, typical_p=self.typical_p
        )


class LegacyRequest(RequestBody):
    """A prompt and how to answer it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": "The sea is", "parameters": {"max_new_tokens": 20}}]}
    )

    harmless_values: ClassVar[Mapping[str, int]] = HARMLESS_VALUES

    inputs: str = Field(min_length=1, description="the prompt")
    stream: Flag = Field(False, description="stream the answer; only POST /models/M reads this")
    parameters: LegacyParameters = LegacyParameters()


class LegacyAnswer(BaseModel):
    """A full answer. ``details`` stands there only if asked for."""

    generated_text: str
    details: Details | None = None


class LegacyEvent(BaseModel):
    """The data of one server-sent event, as the older system's clients expect it."""

    event: Literal["message", "error"]
    retry: Literal[30_000] = Field(description="milliseconds")
    data: str | int = Field(description="the text of a step; at last, with return_full_text, of all steps; a number")
    details: Details | None = Field(None, description="in the last event, if asked for")
