"""What forms an answer can be asked to have: ``response_format`` and its relatives of the other protocols."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from client.schemas.request_body import RequestBody
from server.errors import InvalidRequest
from server.grammar import ANY_JSON_OBJECT
from server.request import Constraint, ConstraintKind

MAX_CHOICES = 1024
MAX_NAME_CHARACTERS = 64


def _schema(value: object) -> dict[str, Any]:
    """A JSON schema, also as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PydanticCustomError("schema", "must be a JSON schema") from None
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "must be a JSON schema, an object")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_schema, json_schema_input_type=dict[str, Any] | str)]
Choices = Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_CHOICES)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NamedSchema(_Strict):
    """A JSON schema with what OpenAI's clients send beside it."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    description: StrictStr | None = None
    schema_: Schema | None = Field(None, alias="schema", description="left out: any object")
    strict: StrictBool | None = Field(None, description="whatever it says, an answer that ends has the schema")


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]
    value: Schema | None = Field(None, description="where huggingface_hub puts the schema; left out: any object")


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class JsonGrammar(_Strict):
    type: Literal["json"]
    value: Schema


class JsonSchemaGrammar(_Strict):
    type: Literal["json_schema"]
    value: NamedSchema


class RegexGrammar(_Strict):
    type: Literal["regex"]
    value: StrictStr


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonGrammar | RegexGrammar, Field(discriminator="type")
]


class StructuredOutputs(RequestBody):
    """vLLM's ``structured_outputs``: one of these."""

    json_: Schema | None = Field(None, alias="json", description="a JSON schema")
    json_object: StrictBool | None = Field(None, description="true: any JSON object")
    regex: StrictStr | None = None
    choice: Choices | None = None
    grammar: StrictStr | None = Field(None, description="in Lark, or in EBNF as in llama.cpp")


class FormedBody(RequestBody):
    """The fields of OpenAI's and vLLM's requests that say which form the answer must have; one at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="as structured_outputs.json")
    guided_regex: StrictStr | None = Field(None, description="as structured_outputs.regex")
    guided_choice: Choices | None = Field(None, description="as structured_outputs.choice")
    guided_grammar: StrictStr | None = Field(None, description="as structured_outputs.grammar")

    def constraint(self) -> Constraint | None:
        """What the answer must be.

        Raises:
            InvalidRequest: the request says it more than once.
        """
        found = [one for one in (*self._of_format(), *self._of_outputs(), *self._guided()) if one]
        if len(found) > 1:
            raise InvalidRequest(f"cannot be given with {found[0].field}: an answer has one form", found[1].field)
        if self.structured_outputs and not self._of_outputs():
            raise InvalidRequest("must have one of json, json_object, regex, choice and grammar", "structured_outputs")
        return found[0] if found else None

    def _of_format(self) -> list[Constraint]:
        match self.response_format:
            case JsonObjectFormat(value=schema) | JsonSchemaFormat(json_schema=NamedSchema(schema_=schema)):
                schema = ANY_JSON_OBJECT if schema is None else schema
                return [Constraint(kind="json_schema", value=schema, field="response_format")]
            case JsonGrammar() | RegexGrammar() as grammar:
                return [tgi_constraint(grammar, "response_format")]
            case _:
                return []

    def _of_outputs(self) -> list[Constraint]:
        if (outputs := self.structured_outputs) is None:
            return []
        found = _given(
            json=("json_schema", outputs.json_),
            json_object=("json_schema", ANY_JSON_OBJECT if outputs.json_object else None),
            regex=("regex", outputs.regex),
            choice=("choice", outputs.choice),
            grammar=("grammar", outputs.grammar),
        )
        return [Constraint(kind=kind, value=value, field=f"structured_outputs.{name}") for name, kind, value in found]

    def _guided(self) -> list[Constraint]:
        found = _given(
            guided_json=("json_schema", self.guided_json),
            guided_regex=("regex", self.guided_regex),
            guided_choice=("choice", self.guided_choice),
            guided_grammar=("grammar", self.guided_grammar),
        )
        return [Constraint(kind=kind, value=value, field=name) for name, kind, value in found]


def _given(**fields: tuple[ConstraintKind, Any]) -> list[tuple[str, ConstraintKind, Any]]:
    return [(name, kind, value) for name, (kind, value) in fields.items() if value is not None]


TgiGrammar = Annotated[JsonGrammar | JsonSchemaGrammar | RegexGrammar, Field(discriminator="type")]


def tgi_constraint(grammar: JsonGrammar | JsonSchemaGrammar | RegexGrammar, field: str = "grammar") -> Constraint:
    """What Text Generation Inference's ``grammar`` asks of the answer."""
    match grammar:
        case RegexGrammar(value=regex):
            return Constraint(kind="regex", value=regex, field=field)
        case JsonGrammar(value=schema):
            return Constraint(kind="json_schema", value=schema, field=field)
        case JsonSchemaGrammar(value=named):
            schema = ANY_JSON_OBJECT if named.schema_ is None else named.schema_
            return Constraint(kind="json_schema", value=schema, field=field)
