"""Text Generation Inference: ``POST /``, ``/generate`` and ``/generate_stream``, ``GET /info``, of the first model."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from sse_starlette.sse import EventSourceResponse
from starlette.responses import JSONResponse, Response

from client.deployment import Deployment, ServedModel
from client.routes.connected import check_complete, collect_while_connected
from client.routes.errors import documented, problem_of
from client.routes.event_stream import event_stream
from client.routes.json_body import require_json
from client.routes.problem import TGI
from client.schemas.details import FINISH_REASONS, details_of
from client.schemas.tgi import StreamEvent, TgiAnswer, TgiInfo, TgiParameters, TgiRequest
from config.version import __version__
from server.errors import ServingError
from server.request import TokenLogprob
from server.request_stream import Increment, RequestStream

PING_SECONDS = 15  # as Text Generation Inference does
ROUTER = "mindspore-llm-serving"
STREAM = event_stream(StreamEvent)
ERRORS = documented(400, 413, 415, 422, 429, 431, 500, 503, dialect=TGI)

encode = msgspec.json.Encoder().encode
logger = logging.getLogger(__name__)

router = APIRouter(tags=["Text Generation Inference"])
accepts_json = [Depends(require_json)]


class Json(JSONResponse):
    """A JSON answer from plain values."""

    def render(self, content: Any) -> bytes:
        return encode(content)


@dataclass(frozen=True)
class Call:
    """One request."""

    request: Request
    deployment: Deployment

    @property
    def model(self) -> ServedModel:
        """The first model: these routes name none."""
        return self.deployment.models[0]

    async def submit(self, body: TgiRequest, *, stream: bool) -> Accepted:
        """Hand the request to the model.

        Raises:
            ServingError: it is refused.
        """
        request_id: str = self.request.state.request_id
        params = body.parameters.generation_params(self.deployment.config.limits, stream=stream)
        self.deployment.log_prompt(request_id, self.model.config.names[0], body.inputs)
        streams = await self.model.submit_all(body.inputs, params, body.parameters.best_of or 1, request_id)
        prefix = body.inputs if body.parameters.return_full_text else ""
        return Accepted(self, body.parameters, prefix, params.sampling.seed, streams)


@dataclass(frozen=True)
class Accepted:
    """A request that is being answered."""

    call: Call
    parameters: TgiParameters
    prefix: str  # of every generated text
    seed: int  # of the first of the streams; the next have the next
    streams: list[RequestStream]

    async def full(self) -> dict[str, Any]:
        """The likeliest answer, once all are there."""
        answers = await collect_while_connected(self.streams, self.call.request)
        best = max(range(len(answers)), key=lambda i: _total_logprob(answers[i]))
        content: dict[str, Any] = {"generated_text": self.prefix + answers[best].text}
        if self.parameters.wants_details:
            content["details"] = self._details(answers[best], best)
            if len(answers) > 1:
                content["details"]["best_of_sequences"] = [
                    {"generated_text": self.prefix + answer.text, **self._details(answer, i)}
                    for i, answer in enumerate(answers)
                    if i != best
                ]
        return content

    def streamed(self) -> Response:
        """The only answer as it comes."""
        return EventSourceResponse(self._events(self.streams[0]), ping=PING_SECONDS)

    def _details(self, answer: Increment, number: int) -> dict[str, Any]:
        top_n_tokens = self.parameters.top_n_tokens
        return details_of(answer, self.seed + number, top_n_tokens, self.call.model.token).content()

    async def _events(self, stream: RequestStream) -> AsyncIterator[bytes]:
        """Server-sent events; those of all tokens that are there are sent together."""
        texts = [self.prefix]
        index = 0
        try:
            while steps := await stream.take():
                events = []
                for step in steps:
                    texts.append(step.text)
                    for token in step.tokens:
                        index += 1
                        event = self._event(index, token, step.text)
                        if step.stop_kind:
                            event["generated_text"] = "".join(texts)
                            event["details"] = self._stream_details(step, index, stream)
                        events.append(b"data:%b\n\n" % encode(event))
                if events:
                    yield b"".join(events)
                check_complete(steps[-1])
        except ServingError as error:
            request = self.call.request
            logger.error("%s: %s", request.state.request_id, error)
            problem = problem_of(error, request.state.request_id)
            yield b"data:%b\n\n" % encode(problem.body(request.url.path).model_dump())
        finally:
            stream.abort()

    def _event(self, index: int, token: TokenLogprob, text: str) -> dict[str, Any]:
        """The event of a token that adds ``text`` to the answer."""
        special = token.special and not text  # the end token may bring what was held back
        shown = token.text if special else text
        return {
            "index": index,
            "token": {"id": token.token_id, "text": shown, "logprob": token.logprob, "special": special},
            "top_tokens": [self._top_token(*top) for top in token.top[: self.parameters.top_n_tokens]],
            "generated_text": None,
            "details": None,
        }

    def _top_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, special = self.call.model.token(token_id)
        return {"id": token_id, "text": text, "logprob": logprob, "special": special}

    def _stream_details(self, last: Increment, tokens: int, stream: RequestStream) -> dict[str, Any] | None:
        if not self.parameters.details:
            return None
        assert last.stop_kind is not None, "a whole answer was ended by something"
        return {
            "finish_reason": FINISH_REASONS[last.stop_kind],
            "generated_tokens": tokens,
            "seed": self.seed,
            "input_length": len(stream.prompt_ids),
        }


def _total_logprob(answer: Increment) -> float:
    return sum(token.logprob or 0.0 for token in answer.tokens)


async def _call(request: Request) -> Call:
    return Call(request, request.app.state.deployment)


ToFirst = Annotated[Call, Depends(_call)]


@router.post(
    "/",
    dependencies=accepts_json,
    response_class=Json,
    responses={200: {"model": list[TgiAnswer], "content": STREAM}, **ERRORS},
)
async def answer(call: ToFirst, body: TgiRequest) -> Response:
    """A list with the full answer, or a stream if `stream` is true."""
    accepted = await call.submit(body, stream=body.stream)
    return accepted.streamed() if body.stream else Json([await accepted.full()])


@router.post(
    "/generate", dependencies=accepts_json, response_class=Json, responses={200: {"model": TgiAnswer}, **ERRORS}
)
async def generate(call: ToFirst, body: TgiRequest) -> Response:
    """The full answer, whatever `stream` says."""
    return Json(await (await call.submit(body, stream=False)).full())


@router.post(
    "/generate_stream",
    dependencies=accepts_json,
    response_class=Response,
    responses={200: {"content": STREAM}, **ERRORS},
)
async def generate_stream(call: ToFirst, body: TgiRequest) -> Response:
    """The answer as a stream, one event a token, whatever `stream` says."""
    return (await call.submit(body, stream=True)).streamed()


@router.get("/info", responses=documented(431, dialect=TGI))
async def info(call: ToFirst) -> TgiInfo:
    """The first model and its limits."""
    limits = call.deployment.config.limits
    context = call.model.server.max_model_len
    return TgiInfo(
        model_id=call.model.config.names[0],
        model_sha=None,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=limits.max_num_seqs + limits.max_waiting,
        max_best_of=limits.max_answers,
        max_stop_sequences=limits.max_stop_strings,
        max_input_tokens=context - 1,
        max_total_tokens=context,
        validation_workers=1,
        max_client_batch_size=1,
        router=ROUTER,
        version=__version__,
        sha=None,
        docker_label=None,
    )
