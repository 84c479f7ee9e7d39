"""Waiting for whole answers while their client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request

from server.errors import ShuttingDown
from server.request_stream import Increment, RequestStream


async def collect_while_connected(streams: Sequence[RequestStream], request: Request) -> list[Increment]:
    """The whole answer of each. If the client leaves before all are there, or this is cancelled, they are aborted.

    Raises:
        ClientDisconnect: the client has left.
        ServingError: an answer could not be finished, or (``ShuttingDown``) the server stops first.
    """
    answers = asyncio.ensure_future(_collect(streams))
    departure = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait((answers, departure), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientDisconnect
        collected = answers.result()
    finally:
        for stream in streams:
            stream.abort()
        answers.cancel()
        departure.cancel()
    for answer in collected:
        check_complete(answer)
    return collected


def check_complete(increment: Increment) -> None:
    """Whether this part of an answer is followed by the rest, or by nothing because the answer is whole.

    Raises:
        ShuttingDown: it was cut short.
    """
    if increment.finish_reason == "abort":
        raise ShuttingDown("the server is shutting down and has not finished this answer")


async def _collect(streams: Sequence[RequestStream]) -> list[Increment]:
    return await asyncio.gather(*(stream.collect() for stream in streams))


async def _departure(request: Request) -> None:
    """Returns when the client has closed its connection; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
