"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from client.routes.errors import documented
from client.routes.event_stream import event_stream
from client.routes.json_body import require_json
from client.routes.openai_answer import DONE, Accepted, Call, Json, finish_reason
from client.routes.openai_logprobs import TokensOfText, chat_logprobs
from client.routes.problem import CHAT_PATH, OPENAI
from client.routes.served import Served
from client.schemas.openai_chat import ChatChunk, ChatCompletion, ChatRequest
from client.schemas.tools import tool_calls_content
from server.request_stream import Increment
from server.tokenizer import Tokenizer
from server.tool_calls import ToolCall, ToolCallParser

NAMELESS = ("dummy", "tgi")  # what huggingface_hub sends, and its documents say, where a server has one model

ERRORS = documented(400, 404, 413, 415, 422, 429, 431, 500, 503, dialect=OPENAI)

router = APIRouter(tags=["OpenAI"], dependencies=[Depends(require_json)])


class ChatAnswer:
    """One answer to the conversation."""

    def __init__(self, index: int, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._tokens = TokensOfText(tokenizer) if body.logprobs else None
        self._parser = ToolCallParser() if body.may_call else None
        self._num_calls = 0
        self._begun = False

    def whole(self, answer: Increment) -> dict[str, Any]:
        text, calls = self._parsed(answer)
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = tool_calls_content(calls)
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(answer),
            "finish_reason": self._finish_reason(answer),
        }

    def chunks(self, part: Increment) -> list[dict[str, Any]]:
        entries = []
        if not self._begun:
            self._begun = True
            entries.append(self._entry({"role": "assistant", "content": "", "refusal": None}))
        logprobs = self._logprobs(part)
        first_index = self._num_calls
        text, calls = self._parsed(part)
        if text or (logprobs and logprobs["content"]):
            entries.append(self._entry({"content": text}, logprobs))
        if calls:
            entries.append(self._entry({"tool_calls": tool_calls_content(calls, first_index=first_index)}))
        if reason := self._finish_reason(part):
            entries.append(self._entry({}, finish_reason=reason))
        return entries

    def _parsed(self, part: Increment) -> tuple[str, list[ToolCall]]:
        """What of the next part is text, and the calls that it completes."""
        if self._parser is None:
            return part.text, []
        text, calls = self._parser.feed(part.text)
        if part.finish_reason:
            text += self._parser.flush()
        self._num_calls += len(calls)
        return text, calls

    def _finish_reason(self, part: Increment) -> str | None:
        reason = finish_reason(part)
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _entry(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, part: Increment) -> dict[str, Any] | None:
        return None if self._tokens is None else chat_logprobs(self._tokens.take(part), self._tokenizer)


@router.post(
    CHAT_PATH,
    response_class=Json,
    responses={200: {"model": ChatCompletion, "content": event_stream(ChatChunk, end=DONE)}, **ERRORS},
)
async def chat_completions(request: Request, deployment: Served, body: ChatRequest) -> Response:
    """The next message of a conversation: at once, or as a stream if `stream` is true."""
    if body.model in NAMELESS and body.model not in deployment.names:
        body = body.model_copy(update={"model": deployment.first_name})
    call = Call(request, deployment, deployment.model(body.model))
    params = call.model.with_chat_end(body.model, body.generation_params(deployment.config.limits))
    messages = [message.for_template() for message in body.messages]
    prompt = call.model.chat_prompt(body.model, messages, body.tools_for_template())
    deployment.log_prompt(call.request_id, body.model, prompt)
    streams = await call.model.submit_all(prompt, params, body.n, call.request_id)
    tokenizer = call.model.server.tokenizer
    choices = [ChatAnswer(index, body, tokenizer) for index in range(body.n)]
    accepted = Accepted(
        call, body, streams, choices, id_prefix="chatcmpl", kind="chat.completion", chunk_kind="chat.completion.chunk"
    )
    return await accepted.respond()
