"""``POST /v1/chat/completions``: the request, its answer, the chunks of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from client.schemas.openai_generation import GenerationBody, ServiceTier, Usage
from client.schemas.request_body import MAX_TOKENS_FIELD, Only, RequestBody
from client.schemas.tools import MAX_TOOLS, AssistantToolCall, ToolsBody
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import GenerationParams

MAX_MESSAGES = 1024
MAX_PARTS = 128

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


def _text_of_part(part: object) -> object:
    return part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None


def _text(content: object) -> object:
    """The parts of a message joined."""
    if not isinstance(content, list):
        return content
    texts = [text for part in content if isinstance(text := _text_of_part(part), str)]
    if len(texts) < len(content) or len(texts) > MAX_PARTS:
        raise PydanticCustomError("parts", "content must be a text or a list of text parts; nothing else can be read")
    return "".join(texts)


Parts = Annotated[list[TextPart], Field(max_length=MAX_PARTS)]
Content = Annotated[StrictStr, BeforeValidator(_text, json_schema_input_type=str | Parts)]


class ChatMessage(RequestBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is taken as system; tool: what a call came to"
    )
    content: Content | None = Field(None, description="only an assistant's message with tool_calls may be without")
    name: StrictStr | None = Field(None, description="for templates that read it")
    tool_calls: Annotated[list[AssistantToolCall], Field(max_length=MAX_TOOLS)] = Field(
        [], description="the calls that an assistant's message made"
    )
    tool_call_id: StrictStr | None = Field(None, description="of a tool's message: the call that it answers")

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant's message has tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise PydanticCustomError("tool_call_id", "only a tool's message has a tool_call_id")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it.

        Raises:
            InvalidRequest: the arguments of a call are no JSON object.
        """
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatRequest(ToolsBody, GenerationBody):
    """A conversation, and how to answer it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "llama2", "messages": [{"role": "user", "content": "What is the sea?"}], "max_tokens": 20}
            ]
        }
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: StrictInt | None = Field(
        None, ge=1, le=MAX_TOKENS_FIELD, description="left out: what the context leaves"
    )
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS_FIELD, description="its older name")
    logprobs: StrictBool = Field(False, description="tell the answer's tokens with their log-probabilities")
    top_logprobs: StrictInt | None = Field(None, ge=0, description="and so many likeliest at each place")
    modalities: Annotated[list[str], Only(["text"])] | None = Field(None, description="answers are text")
    reasoning_effort: Annotated[str, Only("none")] | None = Field(None, description="models are not told how to reason")
    verbosity: Annotated[str, Only("medium")] | None = Field(None, description="models are not told how much to say")
    add_generation_prompt: Annotated[bool, Only(True)] = Field(True, description="the answer is a new message")

    @property
    def num_logprobs(self) -> int | None:
        """None, or how many likeliest tokens are told beside the chosen one."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def generation_params(self, limits: LimitsConfig) -> GenerationParams:
        """These parameters as the server takes them, with a seed drawn if none is given.

        Raises:
            InvalidRequest: beyond the deployment's limits, or fields contradict each other.
        """
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise InvalidRequest("is not what max_completion_tokens is; give one of them", "max_tokens")
        max_tokens = given.pop() if given else None
        self._check(limits, self.top_logprobs or 0, max_tokens)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("needs logprobs: true", "top_logprobs")
        return GenerationParams(
            sampling=self._sampling(self.num_logprobs),
            max_new_tokens=max_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            add_special_tokens=False,  # the template writes them out
            priority=self.priority,
            cache_salt=self.cache_salt,
            constraint=self.constraint(),
        )


class ChatTopLogprob(BaseModel):
    token: str = Field(description="a token that is no text of its own: bytes: and its bytes")
    logprob: float = Field(description="log-softmax of the model's raw logits")
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob] = Field(description="the likeliest tokens at this place, best first")


class ChatLogprobs(BaseModel):
    """The tokens that the content is made of."""

    content: list[ChatTokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="null if the answer is calls and nothing else")
    refusal: None
    tool_calls: list[AssistantToolCall] | None = Field(None, description="only if the answer has any")


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(BaseModel):
    """Whole answers."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: ServiceTier = None


class ToolCallDelta(AssistantToolCall):
    """A whole call; its arguments are not cut over several chunks."""

    index: int


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(None, description="in the first chunk of a choice, with an empty content")
    content: str | None = Field(None, description="of this step; not there in the last chunk of a choice")
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = Field(None, description="calls that this step completes")


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None = Field(description="in the last chunk of this choice")


class ChatChunk(BaseModel):
    """The data of one event of a stream. After the last one comes ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice] = Field(description="one; none in the chunk with the usage")
    usage: Usage | None = Field(None, description="only if asked for: null, and in the last chunk the usage")
    service_tier: ServiceTier = None
