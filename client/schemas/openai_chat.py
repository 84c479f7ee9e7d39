"""``POST /v1/chat/completions``: the request, its answer, the chunks of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from client.schemas.openai_generation import FinishReason, GenerationBody, Usage
from client.schemas.request_body import MAX_TOKENS_FIELD, RequestBody
from config.serving_config import LimitsConfig
from server.errors import InvalidRequest
from server.request import GenerationParams

MAX_MESSAGES = 1024
MAX_PARTS = 128


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

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is taken as system")
    content: Content
    name: StrictStr | None = Field(None, description="for templates that read it")

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content, **({} if self.name is None else {"name": self.name})}


class ChatRequest(GenerationBody):
    """A conversation, and how to answer it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "llama2", "messages": [{"role": "user", "content": "What is the sea?"}], "max_tokens": 20}
            ]
        }
    )
    harmless_values: ClassVar[Mapping[str, object]] = {
        **GenerationBody.harmless_values,
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "tool_choice": "none",
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: StrictInt | None = Field(
        None, ge=1, le=MAX_TOKENS_FIELD, description="left out: what the context leaves"
    )
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS_FIELD, description="its older name")
    logprobs: StrictBool = Field(False, description="tell the answer's tokens with their log-probabilities")
    top_logprobs: StrictInt | None = Field(None, ge=0, description="and so many likeliest at each place")

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
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Whole answers."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(None, description="in the first chunk of a choice, with an empty content")
    content: str | None = Field(None, description="of this step; not there in the last chunk of a choice")
    refusal: None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None = Field(description="in the last chunk of this choice")


class ChatChunk(BaseModel):
    """The data of one event of a stream. After the last one comes ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice] = Field(description="one; none in the chunk with the usage")
    usage: Usage | None = Field(None, description="only if asked for: null, and in the last chunk the usage")
