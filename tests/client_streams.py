"""A stream of the Python client, read whole, by both kinds of client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from client import AsyncMindsporeInferenceClient, MindsporeInferenceClient
from client.answers import StreamResponse
from client.patience import Retries

AT_ONCE = Retries(longest_wait=0.1, first_wait=0.0)


def step(text: str) -> dict[str, Any]:
    return {"token": {"text": text, "index": 1}}


def sync_stream(url: str, name: str = "llama2", seen: list[StreamResponse] | None = None, **given: Any) -> None:
    settings = {key: given.pop(key) for key in ("timeout", "retries", "token", "ca") if key in given}
    with MindsporeInferenceClient(name, url, **settings) as client:
        for one in client.generate_stream("hi", **given):
            if seen is not None:
                seen.append(one)


def async_stream(url: str, name: str = "llama2", seen: list[StreamResponse] | None = None, **given: Any) -> None:
    settings = {key: given.pop(key) for key in ("timeout", "retries", "token", "ca") if key in given}

    async def read() -> None:
        async with AsyncMindsporeInferenceClient(name, url, **settings) as client:
            async for one in client.generate_stream("hi", **given):
                if seen is not None:
                    seen.append(one)

    asyncio.run(read())


both = pytest.mark.parametrize("streamed", [sync_stream, async_stream], ids=["sync", "async"])


def texts(steps: Sequence[StreamResponse]) -> str:
    return "".join(one.token.text for one in steps if one.token)
