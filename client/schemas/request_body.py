"""What the request bodies of several protocols have in common: which fields say nothing, and shared bounds."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from config.serving_config import LimitsConfig
from server.errors import InvalidRequest

MAX_STOP_CHARACTERS = 1024  # of one stop string
MAX_TOKENS_FIELD = 2**31 - 1  # counts travel as int32; the model's context is checked later
MAX_SEED = 2**64 - 1
RANDOM_SEED_BITS = 53  # a reported seed survives a client whose numbers are doubles

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]

NOTHING: tuple[object, ...] = (None, False, "False", "false", "", [], {})


def says_nothing(value: object) -> bool:
    """Whether a field has no effect with this value: null, false or empty."""
    return any(value == nothing and type(value) is type(nothing) for nothing in NOTHING)


def _refuse(value: object) -> None:
    if not says_nothing(value):
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")


Unsupported = Annotated[None, BeforeValidator(_refuse), WithJsonSchema({"enum": list(NOTHING)})]


class Only:
    """Of a field that this server knows in one way: these values, which say what it does anyway."""

    def __init__(self, *values: object) -> None:
        self._values = values

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [*self._values, None]}

    def _check(self, value: object) -> object:
        if not any(value == known and type(value) is type(known) for known in self._values):
            values = " or ".join(map(json.dumps, self._values))
            raise PydanticCustomError("only", f"can only be {values} on this server")
        return value


class RequestBody(BaseModel):
    """Null fields take their default; undocumented ones are ignored where they say nothing, else refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    harmless_values: ClassVar[Mapping[str, object]] = {}  # fields of related protocols, with what changes nothing

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, body: object) -> dict[str, object]:
        if not isinstance(body, dict):
            raise PydanticCustomError("object", "must be a JSON object")
        known = cls._fields_by_name()
        return {
            name: value
            for name, value in body.items()
            if value is not None and (name in known or not cls._is_harmless(name, value))
        }

    @classmethod
    def _fields_by_name(cls) -> dict[str, FieldInfo]:
        """By the names that clients use."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def _is_harmless(cls, name: str, value: object) -> bool:
        return says_nothing(value) or (value is not True and value == cls.harmless_values.get(name))

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The rules above, as a schema can say them."""
        schema = handler.resolve_ref_schema(handler(core))
        fields = cls._fields_by_name()
        for name, field in schema["properties"].items():
            if not fields[name].is_required():
                _allow_null(field)
        nothing = list(NOTHING)
        for name, value in cls.harmless_values.items():
            schema["properties"].setdefault(name, {"enum": [value, *nothing], "default": value})
        schema["additionalProperties"] = {"enum": nothing}
        return schema


def check_answers(count: int, limits: LimitsConfig, field: str) -> None:
    """Whether one request may have so many answers; ``field`` is to blame if not.

    Raises:
        InvalidRequest: it may not.
    """
    if count > limits.max_answers:
        raise InvalidRequest(f"asks for {count} answers in all, at most {limits.max_answers} are allowed", field)


def check_limits(stop: Sequence[str], top_n_tokens: int, seed: int | None, limits: LimitsConfig) -> None:
    """Whether a request keeps to what the deployment allows, and its seed to 64 bits.

    Raises:
        InvalidRequest: it does not.
    """
    if len(stop) > limits.max_stop_strings:
        raise InvalidRequest(f"has {len(stop)} texts, at most {limits.max_stop_strings} are allowed", "stop")
    if top_n_tokens > limits.max_top_n_tokens:
        raise InvalidRequest(f"must be at most {limits.max_top_n_tokens}", "top_n_tokens")
    if seed is not None and seed > MAX_SEED:
        raise InvalidRequest(f"must be at most {MAX_SEED}", "seed")


def random_seed() -> int:
    """A seed for a request that brings none."""
    return secrets.randbits(RANDOM_SEED_BITS)


def _allow_null(field: dict[str, Any]) -> None:
    """Let a property's schema take null too."""
    if "enum" in field:
        return  # of what says nothing, null among it
    choices = field.get("anyOf")
    if choices is None:
        kept: dict[str, Any] = {name: field.pop(name) for name in ("title", "description", "default") if name in field}
        choices = [dict(field)]
        field.clear()
        field |= {**kept, "anyOf": choices}
    if {"type": "null"} not in choices:
        choices.append({"type": "null"})
