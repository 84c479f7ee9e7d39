"""Tools in OpenAI's shape: what a request offers, what it demands, and the calls of an answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from client.schemas.answer_form import FormedBody, Schema
from server.errors import InvalidRequest
from server.request import Constraint
from server.tool_calls import ToolCall, ToolChoice

MAX_TOOLS = 128

Name = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class _Known(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Function(_Known):
    """A function that the model may call."""

    name: Name
    description: StrictStr | None = None
    parameters: Schema | None = Field(None, description="the JSON schema of its arguments; left out: any object")
    strict: StrictBool | None = Field(None, description="whatever it says, arguments have the schema")


class Tool(_Known):
    type: Literal["function"]
    function: Function


class FunctionName(_Known):
    name: Name


class NamedTool(_Known):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(_Known):
    name: Name
    arguments: StrictStr = Field(description="a JSON object, as text")


class AssistantToolCall(_Known):
    """A call that an earlier answer made."""

    id: StrictStr
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: arguments are an object, not its text.

        Raises:
            InvalidRequest: the arguments are no JSON object.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequest(f"the arguments of the call {self.id} are no JSON object", "messages")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def _different_names(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise PydanticCustomError("names", "two tools have the same name")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_different_names)]


class ToolsBody(FormedBody):
    """The fields of a chat request about tools, beside those about the answer's form."""

    tools: Tools = Field([])
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="none: no calls; auto: the model decides; required: calls only; or the one to call"
    )
    parallel_tool_calls: StrictBool = Field(True, description="false: one call at most")

    @property
    def may_call(self) -> bool:
        """Whether the answer can hold calls."""
        return bool(self.tools) and self.tool_choice != "none"

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """The tools that the prompt shows, if any."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.may_call else None

    def constraint(self) -> Constraint | None:
        """What the answer must be.

        Raises:
            InvalidRequest: the request says it more than once, or demands a tool that it does not bring.
        """
        form = super().constraint()
        if not self.may_call:
            if self.tool_choice not in (None, "none", "auto"):
                raise InvalidRequest("demands a call, and there are no tools", "tool_choice")
            return form
        if form:
            raise InvalidRequest("cannot be given with tools that may be called: an answer has one form", form.field)
        return Constraint(kind="tool_calls", value=self._choice().source(), field="tools")

    def _choice(self) -> ToolChoice:
        tools = {tool.function.name: tool.function.parameters or {} for tool in self.tools}
        if not isinstance(self.tool_choice, NamedTool):
            return ToolChoice(tools=tools, required=self.tool_choice == "required", parallel=self.parallel_tool_calls)
        name = self.tool_choice.function.name
        if name not in tools:
            raise InvalidRequest(f"names {name}, which is not among the tools", "tool_choice")
        return ToolChoice(tools={name: tools[name]}, required=True, parallel=False)


def tool_calls_content(calls: Sequence[ToolCall], *, first_index: int | None = None) -> list[Mapping[str, Any]]:
    """Calls of an answer in OpenAI's shape; those of a stream are numbered, from ``first_index``."""
    return [
        {
            **({} if first_index is None else {"index": first_index + i}),
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]
