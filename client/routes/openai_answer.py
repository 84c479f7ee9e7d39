"""What answers to completions and to chats have in common: several choices at a time, usage, the stream of chunks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from fastapi import Request
from sse_starlette.sse import EventSourceResponse
from starlette.responses import JSONResponse, Response

from client.deployment import Deployment, ServedModel
from client.routes.connected import check_complete, collect_while_connected
from client.routes.errors import problem_of
from client.schemas.openai_generation import GenerationBody
from server.errors import ServingError
from server.request_stream import Increment, RequestStream

DONE = "[DONE]"  # the data of a stream's last event
PING_SECONDS = 15  # a comment, so that nobody in between takes a queued request for dead

encode = msgspec.json.Encoder().encode
logger = logging.getLogger(__name__)


class Json(JSONResponse):
    """A JSON answer from plain values."""

    def render(self, content: Any) -> bytes:
        return encode(content)


class Choice(Protocol):
    """One of the answers in the making."""

    def whole(self, answer: Increment) -> dict[str, Any]:
        """Its entry in a whole answer."""

    def chunks(self, part: Increment) -> list[dict[str, Any]]:
        """Its entries in a stream, each in a chunk of its own."""


@dataclass(frozen=True)
class Call:
    """One request to one model."""

    request: Request
    deployment: Deployment
    model: ServedModel

    @property
    def request_id(self) -> str:
        state_id: str = self.request.state.request_id
        return state_id


@dataclass(frozen=True)
class Accepted:
    """A request that is being answered: ``n`` answers to the first prompt, then those to the next."""

    call: Call
    body: GenerationBody
    streams: Sequence[RequestStream]
    choices: Sequence[Choice]
    id_prefix: str
    kind: str  # the answer's "object"
    chunk_kind: str
    counted_tokens: bool = True  # False: the answers' tokens were not asked for
    created: int = field(default_factory=lambda: int(time.time()))

    async def respond(self) -> Response:
        """The answer, or its stream if the request asks for one."""
        if self.body.stream:
            return EventSourceResponse(self._events(), ping=PING_SECONDS)
        answers = await collect_while_connected(self.streams, self.call.request)
        choices = [choice.whole(answer) for choice, answer in zip(self.choices, answers, strict=True)]
        tokens = sum(len(answer.tokens) for answer in answers)
        return Json({**self._head(self.kind), "choices": choices, "usage": self._usage(tokens)})

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{self.id_prefix}-{self.call.request_id}"
        tier = {"service_tier": "default"} if self.body.service_tier else {}
        return {"id": name, "object": kind, "created": self.created, "model": self.body.model, **tier}

    def _usage(self, completion_tokens: int) -> dict[str, Any]:
        """Each prompt counts once, whatever ``n`` is."""
        completion_tokens *= self.counted_tokens
        firsts = self.streams[:: self.body.n]
        prompt_tokens = sum(len(stream.prompt_ids) for stream in firsts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(stream.num_cached_tokens for stream in firsts)},
        }

    async def _events(self) -> AsyncIterator[bytes]:
        """Server-sent events; those that are there together are sent together."""
        head = self._head(self.chunk_kind)
        usage = {"usage": None} if self.body.include_usage else {}
        tokens = 0
        try:
            async with aclosing(_parts(self.streams)) as parts:
                async for index, part in parts:
                    tokens += len(part.tokens)
                    chunks = [{**head, "choices": [entry], **usage} for entry in self.choices[index].chunks(part)]
                    if chunks:
                        yield b"".join([_event(chunk) for chunk in chunks])
                    check_complete(part)
            if self.body.include_usage:
                yield _event({**head, "choices": [], "usage": self._usage(tokens)})
            yield b"data: %b\n\n" % DONE.encode()
        except ServingError as error:
            call = self.call
            logger.error("%s: %s", call.request_id, error)
            yield _event(problem_of(error, call.request_id).body(call.request.url.path).model_dump())
        finally:
            for stream in self.streams:
                stream.abort()


def finish_reason(part: Increment) -> str | None:
    """Why the answer ends with this part; of one that was cut short, an error tells."""
    return None if part.finish_reason == "abort" else part.finish_reason


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % encode(content)


async def _parts(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, Increment], None]:
    """The parts of all answers as they come, each with its answer's number.

    Raises:
        ServingError: one of them could not be finished.
    """
    if len(streams) == 1:
        async for part in streams[0]:
            yield 0, part
        return
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, part = waiting.pop(task), task.result()
                if part.finish_reason is None:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, part
    finally:
        for task in waiting:
            task.cancel()
