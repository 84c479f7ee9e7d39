"""Agents that do on purpose what real ones do by accident: scripted peers on real sockets, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_processes import ROOT, standin_deployment

from agent.protocol import (
    GREETING,
    HEADER,
    Attach,
    Channel,
    Heartbeat,
    Hello,
    Message,
    StepOutput,
    StepPlan,
    ints,
    pack_ints,
)
from config.manifest import read_manifest
from config.serving_config import load
from config.silence import BEAT_SECONDS
from server.llm_server import LLMServer
from server.metrics import Metrics

SECRET = b"a secret of thirty-two bytes ..."
MANIFEST = read_manifest(ROOT / "config/standin")
HELLO = Hello(
    model=MANIFEST.name,
    target=MANIFEST.target,
    rank=0,
    world_size=1,
    manifest_digest=MANIFEST.digest(),
    num_blocks=100,
    block_size=MANIFEST.block_size,
    vocab_size=MANIFEST.vocab_size,
    context_length=MANIFEST.context_length,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    capabilities=MANIFEST.capabilities,
    cache_dtype="int32",
    pid=os.getpid(),
)


def letters(plan: StepPlan) -> StepOutput:
    """A right answer: the letter a for every row."""
    return StepOutput(step_id=plan.step_id, token_ids=pack_ints([ord("a")] * ints(plan.sampled_rows).size))


@dataclass
class ScriptedAgent:
    """Greets with ``hellos`` (the last one again and again) and answers plans with ``replies``, then rightly.

    A reply of None closes the connection. Greetings and answers wait for ``going``.
    """

    hellos: list[Hello] = field(default_factory=lambda: [HELLO])
    replies: list[Callable[[StepPlan], Message | None]] = field(default_factory=list)
    connections: int = 0
    going: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.going.set()

    def leave(self) -> None:
        """Break the connection, and do not greet again until ``going`` is set."""
        self.going.clear()
        self._writers.pop().close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(SECRET, "agent")
        self.connections += 1
        hello = self.hellos.pop(0) if len(self.hellos) > 1 else self.hellos[0]

        async def receive() -> Message:
            header = await reader.readexactly(HEADER.size)
            return channel.unseal(header, await reader.readexactly(channel.payload_size(header)))

        async def beat() -> None:
            while True:
                await asyncio.sleep(BEAT_SECONDS)
                writer.write(channel.seal(Heartbeat()))

        beating: asyncio.Task[None] | None = None
        try:
            writer.write(channel.greeting)
            channel.agree(await reader.readexactly(GREETING.size))
            assert isinstance(await receive(), Attach)
            await self.going.wait()
            self._writers.append(writer)
            writer.write(channel.seal(hello))
            beating = asyncio.create_task(beat())
            while True:
                plan = await receive()
                assert isinstance(plan, StepPlan)
                await self.going.wait()
                reply = (self.replies.pop(0) if self.replies else letters)(plan)
                if reply is None:
                    return
                writer.write(channel.seal(reply))
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the server has gone
        finally:
            if beating:
                beating.cancel()
            writer.close()


@contextlib.asynccontextmanager
async def listening(agent: ScriptedAgent) -> AsyncIterator[int]:
    """The port at which ``agent`` can be reached."""
    listener = await asyncio.start_server(agent.serve, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        agent.going.set()
        listener.close()
        await listener.wait_closed()


def server_of(folder: Path, ports: Sequence[int], metrics: Metrics | None = None, **limits: Any) -> LLMServer:
    """A server of the stand-in, with the agent at each port as a group of its own."""
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    model = {"agent_ports": list(ports), "data_parallel": len(ports), "secret_file": str(secret)}
    config = load(standin_deployment(folder, [model], limits=limits).config_path)
    return LLMServer(config.models[0], config, metrics)


def run(folder: Path, agent: ScriptedAgent, main: Callable[[LLMServer], Awaitable[None]]) -> None:
    """Do ``main`` with a server whose only agent is this one."""

    async def whole() -> None:
        async with listening(agent) as port:
            server = server_of(folder, [port])
            try:
                await server.start()
                await main(server)
            finally:
                await server.stop()

    asyncio.run(whole())
