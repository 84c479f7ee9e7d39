"""The Python client of the ``/models`` routes, as the older system's users call it. It speaks HTTP only.

>>> client = MindsporeInferenceClient("llama2", "http://127.0.0.1:9811")          # doctest: +SKIP
>>> client.generate("What is monetary policy?", max_new_tokens=50).generated_text  # doctest: +SKIP
>>> for step in client.generate_stream("What is monetary policy?"):                # doctest: +SKIP
...     print(step.token.text if step.token else "", end="", flush=True)

``AsyncMindsporeInferenceClient`` has the same methods for asyncio. What can go wrong is in ``client/client_errors.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from types import TracebackType
from typing import TypedDict
from urllib.parse import quote

from typing_extensions import Self, Unpack

from client.answers import AnswerLines, Details, DetailToken, Response, StreamResponse, Token, decode
from client.client_errors import ClientError
from client.http_session import AsyncSession, Session
from client.patience import RETRIES, TIMEOUTS, Retries, Timeouts
from client.remote_server import Server

__all__ = [
    "AsyncMindsporeInferenceClient",
    "ClientError",
    "DetailToken",
    "Details",
    "MindsporeInferenceClient",
    "Parameters",
    "Response",
    "Retries",
    "StreamResponse",
    "Timeouts",
    "Token",
]


class Parameters(TypedDict, total=False):
    """How to generate. What is left out or None has the server's default; docs/requests.md says what each means."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    ignore_eos: bool | None
    stop: list[str] | None
    seed: int | None
    truncate: int | None
    details: bool | None
    decoder_input_details: bool | None
    top_n_tokens: int | None


class MindsporeInferenceClient:
    """A client that blocks. Threads may share it; ``close`` it, or use it in a ``with``."""

    def __init__(
        self,
        model_type: str,
        server_url: str,
        token: str | None = None,
        timeout: float | Timeouts = TIMEOUTS,
        *,
        retries: Retries = RETRIES,
        ca: str | Path | None = None,
    ) -> None:
        """``model_type`` is a served name; ``token`` the API key; a ``timeout`` in seconds holds for every wait;
        ``ca`` a file of certificates to trust instead of the usual ones.

        Raises:
            ValueError: the name, the URL, the key or a time cannot be used.
            OSError: the certificates cannot be read.
        """
        self._path = _path(model_type)
        self._session = Session(_server(server_url, token, timeout, retries, ca))

    def generate(self, prompt: str, **parameters: Unpack[Parameters]) -> Response:
        """The whole answer.

        Raises:
            ClientError: there is none.
        """
        return decode(self._session.call(f"{self._path}/generate", _body(prompt, parameters)), Response)

    def generate_stream(
        self, prompt: str, *, return_full_text: bool = True, **parameters: Unpack[Parameters]
    ) -> Generator[StreamResponse, None, None]:
        """The answer as it comes, and with ``return_full_text`` one more item that holds all of it.

        Whoever stops reading closes the generator, as leaving a ``for`` does; that ends the request on the server.

        Raises:
            ClientError: there is none, or it broke off; what came before stands.
        """
        body = _body(prompt, parameters, return_full_text)
        return self._session.stream(f"{self._path}/generate_stream", body, AnswerLines(whole=return_full_text))

    def close(self) -> None:
        """Close all connections; answers that are under way end."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncMindsporeInferenceClient:
    """The same for asyncio. ``close`` it, or use it in an ``async with``."""

    def __init__(
        self,
        model_type: str,
        server_url: str,
        token: str | None = None,
        timeout: float | Timeouts = TIMEOUTS,
        *,
        retries: Retries = RETRIES,
        ca: str | Path | None = None,
    ) -> None:
        """As ``MindsporeInferenceClient``."""
        self._path = _path(model_type)
        self._session = AsyncSession(_server(server_url, token, timeout, retries, ca))

    async def generate(self, prompt: str, **parameters: Unpack[Parameters]) -> Response:
        """As ``MindsporeInferenceClient.generate``."""
        return decode(await self._session.call(f"{self._path}/generate", _body(prompt, parameters)), Response)

    async def generate_stream(
        self, prompt: str, *, return_full_text: bool = True, **parameters: Unpack[Parameters]
    ) -> AsyncGenerator[StreamResponse, None]:
        """As ``MindsporeInferenceClient.generate_stream``; ``contextlib.aclosing`` closes it for sure and at once."""
        body = _body(prompt, parameters, return_full_text)
        stream = self._session.stream(f"{self._path}/generate_stream", body, AnswerLines(whole=return_full_text))
        async with contextlib.aclosing(stream):
            async for step in stream:
                yield step

    async def close(self) -> None:
        """Close all connections; answers that are under way end."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _path(model_type: str) -> str:
    """The model's routes. Which names are served only the server knows, but none has the form of other paths."""
    if not model_type.strip() or not model_type.isprintable() or "/" in model_type or model_type in (".", ".."):
        raise ValueError(
            f"model_type {model_type!r} is no served name, such as 'llama2': one has printable characters and no slash"
        )
    return f"/models/{quote(model_type, safe='')}"


def _server(url: str, token: str | None, timeout: float | Timeouts, retries: Retries, ca: str | Path | None) -> Server:
    timeouts = timeout if isinstance(timeout, Timeouts) else Timeouts.all(timeout)
    return Server(url.rstrip("/"), token, ca, timeouts, retries)


def _body(prompt: str, parameters: Parameters, return_full_text: bool | None = None) -> dict[str, object]:
    """The request; lines say apart what events do not: a step, the whole text, an error."""
    told = {**parameters, "return_full_text": return_full_text, "return_protocol": "lines"}
    return {"inputs": prompt, "parameters": {name: value for name, value in told.items() if value is not None}}
