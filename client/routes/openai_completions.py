"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from client.routes.errors import documented
from client.routes.event_stream import event_stream
from client.routes.json_body import require_json
from client.routes.openai_answer import DONE, Accepted, Call, Json, finish_reason
from client.routes.openai_logprobs import TokensOfText, completion_logprobs, joined, prompt_tokens
from client.routes.problem import OPENAI
from client.routes.served import Served
from client.schemas.openai_completion import Completion, CompletionChunk, CompletionRequest
from server.request_stream import Increment, RequestStream
from server.tokenizer import Tokenizer

ERRORS = documented(400, 404, 413, 415, 422, 429, 431, 500, 503, dialect=OPENAI)

router = APIRouter(tags=["OpenAI"], dependencies=[Depends(require_json)])


class CompletionText:
    """One answer to one prompt."""

    def __init__(self, index: int, body: CompletionRequest, prompt: str, tokenizer: Tokenizer) -> None:
        """``prompt`` is what stands in front of the answer: nothing, unless ``echo`` asks for it."""
        self._index = index
        self._body = body
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._tokens = TokensOfText(tokenizer) if body.logprobs is not None else None
        self._begun = False

    def whole(self, answer: Increment) -> dict[str, Any]:
        return self._entry(answer)

    def chunks(self, part: Increment) -> list[dict[str, Any]]:
        entry = self._entry(part)
        told = entry["text"] or entry["finish_reason"] or (entry["logprobs"] and entry["logprobs"]["tokens"])
        return [entry] if told else []

    def _entry(self, part: Increment) -> dict[str, Any]:
        before, self._begun = "" if self._begun else self._prompt, True
        return {
            "index": self._index,
            "text": before + ("" if self._body.only_prompt else part.text),
            "logprobs": self._logprobs(part),
            "finish_reason": finish_reason(part),
        }

    def _logprobs(self, part: Increment) -> dict[str, Any] | None:
        if self._tokens is None:
            return None
        start = len(self._prompt)
        prompt = prompt_tokens(part.prompt_tokens, start, self._tokenizer) if part.prompt_tokens else []
        answer = [] if self._body.only_prompt else self._tokens.take(part)
        return joined(
            completion_logprobs(prompt, self._tokenizer, 0), completion_logprobs(answer, self._tokenizer, start)
        )


async def _submit(call: Call, body: CompletionRequest) -> list[RequestStream]:
    """Hand all prompts to the model, each as if it came alone.

    Raises:
        ServingError: one of them is refused; the others are aborted.
    """
    limits = call.deployment.config.limits
    streams: list[RequestStream] = []
    try:
        for number, prompt in enumerate(body.prompt):
            request_id = call.request_id if len(body.prompt) == 1 else f"{call.request_id}-{number}"
            call.deployment.log_prompt(request_id, body.model, str(prompt))
            params = body.generation_params(limits)  # each prompt with a seed of its own, if none is given
            streams += await call.model.submit_all(prompt, params, body.n, request_id)
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    return streams


def _choices(call: Call, body: CompletionRequest) -> list[CompletionText]:
    tokenizer = call.model.server.tokenizer

    def echoed(prompt: str | list[int]) -> str:
        if not body.echo:
            return ""
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, show_special=True)

    texts = [text for text in map(echoed, body.prompt) for _ in range(body.n)]
    return [CompletionText(index, body, text, tokenizer) for index, text in enumerate(texts)]


@router.post(
    "/v1/completions",
    response_class=Json,
    responses={200: {"model": Completion, "content": event_stream(CompletionChunk, end=DONE)}, **ERRORS},
)
async def completions(request: Request, deployment: Served, body: CompletionRequest) -> Response:
    """How a text, or each of several, goes on: at once, or as a stream if `stream` is true."""
    call = Call(request, deployment, deployment.model(body.model))
    streams = await _submit(call, body)
    kind = "text_completion"
    accepted = Accepted(
        call,
        body,
        streams,
        _choices(call, body),
        id_prefix="cmpl",
        kind=kind,
        chunk_kind=kind,
        counted_tokens=not body.only_prompt,
    )
    return await accepted.respond()
