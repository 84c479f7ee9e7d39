"""Waiting for a whole answer while its client is there."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from server.request_stream import Increment, RequestStream


async def collect_while_connected(stream: RequestStream, request: Request) -> Increment:
    """The whole answer. If the client leaves before it is there, or this is cancelled, the request is aborted.

    Raises:
        ClientDisconnect: the client has left.
        ServingError: the answer could not be finished.
    """
    answer = asyncio.ensure_future(stream.collect())
    departure = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait((answer, departure), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        stream.abort()
        answer.cancel()
        departure.cancel()


async def _departure(request: Request) -> None:
    """Returns when the client has closed its connection; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
