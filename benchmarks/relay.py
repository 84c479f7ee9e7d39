"""Stands between app and agent, and notes when each answer of the agent is handed to the app."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

import msgspec

from agent.protocol import GREETING, HEADER, Message, StepOutput

MOST_BYTES = 1 << 16  # passed on at a time

_decode = msgspec.msgpack.Decoder(Message).decode


class Relay:
    """Passes on what either side sends; the two authenticate each other through it.

    Attributes:
        answers: when each answer to a step was handed on, in seconds of ``time.perf_counter``.
    """

    def __init__(self, agent_port: int) -> None:
        self.answers: list[float] = []
        self._agent_port = agent_port
        self._serving: list[asyncio.Task[None] | None] = []

    @asynccontextmanager
    async def listen(self, port: int) -> AsyncIterator[None]:
        """Be there for the app, at ``port``; at the end, wait until it has closed its connections."""
        async with await asyncio.start_server(self._serve, "127.0.0.1", port):
            yield
            await asyncio.gather(*filter(None, self._serving))

    async def _serve(self, from_app: asyncio.StreamReader, to_app: asyncio.StreamWriter) -> None:
        self._serving.append(asyncio.current_task())
        with closing(to_app), suppress(OSError, asyncio.IncompleteReadError):
            from_agent, to_agent = await asyncio.open_connection("127.0.0.1", self._agent_port)
            with closing(to_agent):
                plans = asyncio.create_task(_pass_on(from_app, to_agent))
                try:
                    await self._pass_answers(from_agent, to_app)
                finally:
                    plans.cancel()

    async def _pass_answers(self, from_agent: asyncio.StreamReader, to_app: asyncio.StreamWriter) -> None:
        to_app.write(await from_agent.readexactly(GREETING.size))
        while True:
            header = await from_agent.readexactly(HEADER.size)
            payload = await from_agent.readexactly(HEADER.unpack(header)[0])
            if isinstance(_decode(payload), StepOutput):
                self.answers.append(time.perf_counter())
            to_app.write(header + payload)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side closes its connection."""
    with closing(writer), suppress(OSError):
        while data := await reader.read(MOST_BYTES):
            writer.write(data)
