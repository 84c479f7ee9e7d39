"""``POST /models/M``, ``/models/M/generate`` and ``/models/M/generate_stream``, for every served name M."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from client.deployment import Deployment, ServedModel
from client.routes.connected import check_complete, collect_while_connected
from client.routes.errors import documented, problem_of
from client.routes.event_stream import event_stream
from client.routes.json_body import require_json
from client.routes.legacy_formats import Events, JsonLine, Lines, StreamFormat
from client.schemas.details import details_of
from client.schemas.legacy import LegacyAnswer, LegacyEvent, LegacyParameters, LegacyRequest
from server.errors import ServingError
from server.request_stream import Increment, RequestStream, join

EVENT = 'data: {"event": "message", "retry": 30000, "data": "…"}\r\n\r\n'
LINE = 'data:{"token": {"text": "…", "index": 1}}\n'
STREAM: dict[str, Any] = {
    **event_stream(LegacyEvent, EVENT),
    "text/plain": {"schema": {"type": "string"}, "example": LINE},
}
ERRORS = documented(400, 404, 413, 415, 422, 429, 431, 500, 503)

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/models", tags=["models"], dependencies=[Depends(require_json)])


@dataclass(frozen=True)
class Call:
    """One request to one served name."""

    request: Request
    model: ServedModel
    name: str

    async def submit(self, body: LegacyRequest) -> Accepted:
        """Hand the request to the model.

        Raises:
            ServingError: it is refused.
        """
        state = self.request.state
        deployment: Deployment = self.request.app.state.deployment
        params = body.parameters.generation_params(deployment.config.limits)
        deployment.log_prompt(state.request_id, self.name, body.inputs)
        stream = await self.model.submit(self.name, body.inputs, params, state.request_id)
        return Accepted(self, body.parameters, params.sampling.seed, stream)


@dataclass(frozen=True)
class Accepted:
    """A request that is being answered."""

    call: Call
    parameters: LegacyParameters
    seed: int
    stream: RequestStream

    async def full(self) -> Response:
        """The whole answer, once it is there."""
        [answer] = await collect_while_connected([self.stream], self.call.request)
        details = self.details(answer)
        return JsonLine({"generated_text": answer.text, **({} if details is None else {"details": details})})

    def streamed(self) -> Response:
        """The answer as it comes."""
        form = Events() if self.parameters.return_protocol == "sse" else Lines()
        return form.response(self._chunks(form))

    def details(self, answer: Increment) -> dict[str, Any] | None:
        """The details of the whole answer, if they were asked for."""
        if not self.parameters.wants_details:
            return None
        return details_of(answer, self.seed, self.parameters.top_n_tokens, self.call.model.token).content()

    async def _chunks(self, form: StreamFormat) -> AsyncIterator[str]:
        keep = self.parameters.return_full_text or self.parameters.wants_details
        parts: list[Increment] = []
        index = 0
        try:
            async for increment in self.stream:
                if increment.text:
                    index += 1
                    yield form.step(increment.text, index)
                if keep:
                    parts.append(increment)
                check_complete(increment)
            if keep:
                answer = join(parts)
                yield form.end(answer.text if self.parameters.return_full_text else None, self.details(answer))
        except ServingError as error:
            request = self.call.request
            logger.error("%s: %s", request.state.request_id, error)
            yield form.error(problem_of(error, request.state.request_id).text(request.url.path))
        finally:
            self.stream.abort()


async def _call(request: Request, name: Annotated[str, Path(alias="model", description="a served name")]) -> Call:
    deployment: Deployment = request.app.state.deployment
    return Call(request, deployment.model(name), name)


ToModel = Annotated[Call, Depends(_call)]


@router.post("/{model}", response_class=JsonLine, responses={200: {"model": LegacyAnswer, "content": STREAM}, **ERRORS})
async def answer(call: ToModel, body: LegacyRequest) -> Response:
    """The full answer, or a stream if `stream` is true."""
    accepted = await call.submit(body)
    return accepted.streamed() if body.stream else await accepted.full()


@router.post("/{model}/generate", response_class=JsonLine, responses={200: {"model": LegacyAnswer}, **ERRORS})
async def generate(call: ToModel, body: LegacyRequest) -> Response:
    """The full answer, whatever `stream` says."""
    return await (await call.submit(body)).full()


@router.post("/{model}/generate_stream", response_class=Response, responses={200: {"content": STREAM}, **ERRORS})
async def generate_stream(call: ToModel, body: LegacyRequest) -> Response:
    """The answer as a stream, whatever `stream` says."""
    return (await call.submit(body)).streamed()
