"""A server as a load client sees it: how its protocol writes a request, and what an answer says of its tokens."""

from __future__ import annotations

import functools
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.exchange import Exchange, LoadError, Piece, connect, events
from benchmarks.prompts import Prompt

Kind = Literal["ours", "tgi", "openai", "chat"]
KINDS: dict[Kind, str] = {
    "ours": "server-sent events of /models/M/generate_stream",
    "tgi": "Text Generation Inference, /generate_stream",
    "openai": "/v1/completions",
    "chat": "/v1/chat/completions",
}
GENERATED = "mindspore_llm_generation_tokens_total"


@dataclass(frozen=True)
class Target:
    """A server and a model of it. ``extra`` goes into each request, beside or instead of what stands there."""

    kind: Kind
    url: str
    model: str
    token: str | None = field(default=None, repr=False)  # the API key
    ca: str | None = None  # a file of certificates to trust instead of the usual ones
    ignore_eos: bool = True  # answers as long as asked for, whatever the model says
    extra: Mapping[str, Any] = field(default_factory=dict)

    def request(self, prompt: Prompt) -> bytes:
        """The HTTP request that streams the answer to ``prompt``."""
        path, content = self._content(prompt)
        body = json.dumps(content, ensure_ascii=False).encode()
        parts = urlsplit(self.url)
        head = [
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if self.token is not None:
            head.append(f"Authorization: Bearer {self.token}")
        return "\r\n".join((*head, "", "")).encode() + body

    async def connect(self) -> Exchange:
        """A new connection.

        Raises:
            OSError: there is no server.
        """
        return await connect(self.url, _trust(self.ca) if self.url.startswith("https:") else None)

    def tokens_made(self) -> int | None:
        """How many tokens the server has made since its start; None if its answers say how many they hold.

        Raises:
            LoadError: it does not tell.
        """
        if self.kind != "ours":
            return None
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            answer = httpx.get(f"{self.url}/metrics", headers=headers, verify=_trust(self.ca), trust_env=False)
            text = answer.raise_for_status().text
        except httpx.HTTPError as error:
            raise LoadError(f"the server does not say how many tokens it has made: {error}") from None
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(int(sample.value) for sample in samples if sample.name == GENERATED)

    def _content(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """Path and body. No protocol but ours and vLLM's has a word for going on past end tokens."""
        past_end = {"ignore_eos": True} if self.ignore_eos else {}
        if self.kind == "ours":
            parameters = {"max_new_tokens": prompt.new_tokens, "return_full_text": False, **past_end, **self.extra}
            return f"/models/{quote(self.model, safe='')}/generate_stream", {
                "inputs": prompt.text,
                "parameters": parameters,
            }
        if self.kind == "tgi":
            parameters = {"max_new_tokens": prompt.new_tokens, "details": True, **self.extra}
            return "/generate_stream", {"inputs": prompt.text, "parameters": parameters}
        common = {
            "model": self.model,
            "max_tokens": prompt.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **past_end,
        }
        if self.kind == "openai":
            return "/v1/completions", {**common, "prompt": prompt.text, **self.extra}
        return "/v1/chat/completions", {
            **common,
            "messages": [{"role": "user", "content": prompt.text}],
            **self.extra,
        }


@dataclass(frozen=True)
class Reading:
    """What one answer holds."""

    arrivals: tuple[float, ...]  # when each event with text in it came
    text: str
    tokens: int | None  # as the answer itself says; None if it does not


def read(kind: Kind, pieces: Sequence[Piece]) -> Reading:
    """Read the answer that came in ``pieces``.

    Raises:
        LoadError: it says that it failed, or is none of this kind.
    """
    arrivals: list[float] = []
    texts: list[str] = []
    tokens: int | None = None
    empty = True
    try:
        for when, event in events(pieces):
            if event.get("event") == "error" or event.get("error"):
                raise LoadError(str(event))
            text, total, here = _said(kind, event)
            empty = False
            tokens = total if total is not None else tokens if here is None else (tokens or 0) + here
            if text:
                arrivals.append(when)
                texts.append(text)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise LoadError(f"this is no answer of the protocol {kind!r}: {error!r}") from None
    if empty:
        raise LoadError(f"this is no answer of the protocol {kind!r}: it has no event")
    # An answer may be nothing but tokens without text; then its end is the first that its client sees
    return Reading(tuple(arrivals) or (pieces[-1][0],), "".join(texts), tokens)


@functools.cache
def _trust(ca: str | None) -> ssl.SSLContext:
    """Reading all certificates takes longer than a request."""
    return ssl.create_default_context(cafile=ca)


def _said(kind: Kind, event: dict[str, Any]) -> tuple[str, int | None, int | None]:
    """Of one event: its text, the tokens of the whole answer, and the tokens of this event, where it says so."""
    if kind == "ours":
        return event["data"], None, None
    if kind == "tgi":
        return event["token"]["text"], (event.get("details") or {}).get("generated_tokens"), 1
    total = (event.get("usage") or {}).get("completion_tokens")
    if not event["choices"]:
        return "", total, None
    choice = event["choices"][0]
    if kind == "openai":
        return choice["text"], total, None
    delta = choice["delta"]
    return delta.get("content") or delta.get("reasoning_content") or "", total, None
