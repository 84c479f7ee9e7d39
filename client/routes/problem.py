"""An error as a client sees it, in the words of the protocol that the client speaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from client.schemas.error import ErrorBody, OpenAIError, OpenAIErrorBody, TgiErrorBody


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What went wrong. ``field`` is named as in ``GenerationParams``, or as the client wrote it."""

    status: int
    message: str  # does not repeat the field's name
    field: str | None = None
    code: str | None = None  # for programs
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def response(self, path: str) -> Response:
        """The answer to a request of ``path``."""
        dialect = dialect_of(path)
        status = dialect.statuses.get(self.status, self.status)
        return JSONResponse(self.body(path).model_dump(), status_code=status, headers=self.headers)

    def body(self, path: str) -> BaseModel:
        """What the answer says, also at the end of a stream."""
        return dialect_of(path).body(self, self.text(path), self._name(path))

    def text(self, path: str) -> str:
        """The message with its field's name in front."""
        name = self._name(path)
        return self.message if name is None else f"{name}: {self.message}"

    def _name(self, path: str) -> str | None:
        return None if self.field is None else dialect_of(path).field_names.get(self.field, self.field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one protocol speaks of errors."""

    model: type[BaseModel]
    body: Callable[[Problem, str, str | None], BaseModel]  # of a problem, its text and its field
    field_names: Mapping[str, str]  # the server's names → those of its requests, where they differ
    statuses: Mapping[int, int] = dataclasses.field(default_factory=dict)  # where it has another than ours


def _legacy(problem: Problem, text: str, name: str | None) -> ErrorBody:
    return ErrorBody(error=text, field=name)


OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 413: "body_too_large"}


def _openai(problem: Problem, text: str, name: str | None) -> OpenAIErrorBody:
    kind = "rate_limit_exceeded" if problem.status == 429 else "invalid_request_error"
    kind = "server_error" if problem.status >= 500 else kind
    code = problem.code or OPENAI_CODES.get(problem.status)
    return OpenAIErrorBody(error=OpenAIError(message=text, type=kind, param=name, code=code))


def _tgi(problem: Problem, text: str, name: str | None) -> TgiErrorBody:
    match problem.status:
        case 401:
            return TgiErrorBody(error=text, error_type="unauthorized")
        case 404:
            return TgiErrorBody(error=text, error_type="not_found")
        case 429:
            return TgiErrorBody(error=text, error_type="overloaded")
        case 503:
            return TgiErrorBody(error=text, error_type="unavailable")
        case status if status >= 500:
            return TgiErrorBody(error=text, error_type="generation")
        case _:
            return TgiErrorBody(error=text, error_type="validation")


_DETAILS = {"prompt_logprobs": "decoder_input_details"}
LEGACY = Dialect(model=ErrorBody, body=_legacy, field_names={"prompt": "inputs", "messages": "inputs", **_DETAILS})
_OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
OPENAI = Dialect(
    model=OpenAIErrorBody,
    body=_openai,
    field_names={**_OPENAI_NAMES, "top_n_tokens": "logprobs", "prompt_logprobs": "logprobs"},
    statuses={422: 400},
)
OPENAI_CHAT = dataclasses.replace(
    OPENAI, field_names={**_OPENAI_NAMES, "top_n_tokens": "top_logprobs", "prompt": "messages"}
)
TGI = Dialect(model=TgiErrorBody, body=_tgi, field_names={"prompt": "inputs", **_DETAILS}, statuses={500: 424})

CHAT_PATH = "/v1/chat/completions"
_TGI_PATHS = ("/", "/generate", "/generate_stream", "/info")


def dialect_of(path: str) -> Dialect:
    """The dialect of whoever asks for ``path``."""
    if path == CHAT_PATH:
        return OPENAI_CHAT
    if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
        return OPENAI
    return TGI if path in _TGI_PATHS else LEGACY
