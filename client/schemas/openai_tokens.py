"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from client.schemas.openai_chat import MAX_MESSAGES, ChatMessage
from client.schemas.openai_generation import TokenId
from client.schemas.request_body import RequestBody

MAX_TOKENS = 1 << 17  # of one request, which keeps everybody else waiting


class TokenizeRequest(RequestBody):
    """A text or a conversation."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "llama2", "prompt": "The sea is"}]})

    model: StrictStr | None = Field(None, description="a served name; left out: the first")
    prompt: StrictStr | None = Field(None, description="this or messages")
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: StrictBool = Field(True, description="begin a prompt as /v1/completions does")


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int = Field(description="tokens of prompt and answer together")
    tokens: list[int]


class DetokenizeRequest(RequestBody):
    """Token ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "llama2", "tokens": [104, 105]}]})

    model: StrictStr | None = Field(None, description="a served name; left out: the first")
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


class DetokenizeAnswer(BaseModel):
    prompt: str = Field(description="special tokens are written out")
