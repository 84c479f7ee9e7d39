"""The connections to all ranks of one model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.protocol import (
    GREETING,
    HEADER,
    Attach,
    Channel,
    Heartbeat,
    Hello,
    Message,
    ProtocolError,
    Replaced,
    StepError,
    StepOutput,
    StepPlan,
    ints,
)
from config.agents_state import AgentsState, read_state
from config.manifest import Manifest
from config.secret_file import SecretError, read_secret
from config.serving_config import LimitsConfig
from config.silence import Silence

RETRY_SECONDS = 0.1  # between two attempts to reach agents that are not there: nothing tells when they are
ATTACH_SECONDS = 10.0  # an agent that accepts a connection and says nothing is not there either
SILENCE_SECONDS = 2.0  # without a heartbeat, and the agent or the network is gone
PATIENCE_SECONDS = 5.0  # beyond a step's deadline, at which the agent ends itself; this is for when it cannot
MAX_UNREAD = 16  # messages; we never wait for as many

_log = logging.getLogger(__name__)


class AgentsLost(ConnectionError):
    """The connection to an agent broke, and with it every answer that was under way."""


class AgentsTaken(AgentsLost):
    """Another server has taken an agent from us; the message says which."""


class AgentsRefused(Exception):
    """The agents are there and cannot serve this model; the message says why."""


class StepFailed(Exception):
    """An agent could not run a plan; it serves on."""


class AgentGroup:
    """All ranks of one group, one connection each: a plan goes to all of them, rank 0 answers for all.

    Attributes:
        place: where its agents are, for messages: ``127.0.0.1:9821, 9822``.
    """

    def __init__(
        self,
        host: str,
        ports: Sequence[int],
        manifest: Manifest,
        limits: LimitsConfig,
        *,
        secret_path: Path,
        state_path: Path,
    ) -> None:
        """``ports`` are in the order of ranks, the paths those of the launcher's files, see ``ServingConfig``."""
        self.place = f"{host}:{', '.join(map(str, ports))}"
        self._host = host
        self._ports = ports
        self._manifest = manifest
        self._limits = limits
        self._secret_path = secret_path
        self._state_path = state_path
        self._agents: dict[int, _Agent] = {}  # by port
        self._ready = False
        self._met = False  # whether there has been a connection

    @property
    def connected(self) -> bool:
        """Whether there are connections, be it that one is lost and ``receive`` has yet to say so."""
        return self._ready

    @property
    def alive(self) -> bool:
        """Whether every agent is connected and gives signs of life."""
        return self._ready and not any(agent.lost for agent in self._agents.values())

    @property
    def state(self) -> AgentsState | None:
        """How the agents are, by their launcher's word; None where that is not known."""
        return read_state(self._state_path)

    @property
    def connections(self) -> dict[str, bool]:
        """The address of every agent, in the order of ranks, and whether it is connected."""
        return {f"{self._host}:{port}": port in self._agents for port in self._ports}

    async def connect(self) -> Hello:
        """Wait until every agent has greeted; the reason for waiting is logged whenever it changes.

        Returns rank 0's greeting, with the fewest blocks that any rank has.

        Raises:
            AgentsRefused: they are not the agents of this model, or cannot do what the server needs, or their launcher
                has given them up since we lost them.
        """
        reason = ""
        while True:
            await self.close()
            results = await asyncio.gather(*map(self._attach, self._ports), return_exceptions=True)
            failure = next((result for result in results if result is not None), None)
            if failure is None:
                hello = self._agree([self._agents[port].hello for port in self._ports])
                self._ready = self._met = True
                return hello
            if not isinstance(failure, OSError):
                raise failure
            state = self.state
            if state and state.phase == "given up" and self._met:
                raise AgentsRefused(f"the agents of {self._manifest.name} are {state}; start them again")
            news = f"{failure} ({state})" if state else str(failure)
            if news != reason:
                reason = news
                _log.info("waiting for the agents of %s: %s", self._manifest.name, reason)
            await asyncio.sleep(RETRY_SECONDS)

    def send(self, plan: StepPlan) -> None:
        """Send a plan to all ranks, which run plans one after another; their answers are received in the same order."""
        for agent in self._agents.values():
            agent.send(plan)

    async def receive(self, plan: StepPlan) -> StepOutput:
        """Rank 0's answer to ``plan``, once all ranks have answered.

        Raises:
            StepFailed: a rank could not run the plan.
            AgentsLost: a connection broke, an agent is silent or its step overdue, a rank says that it ran another step
                than rank 0 or got other tokens, or (``AgentsTaken``) another server has an agent. All are closed then.
        """
        if not self._ready:
            raise AgentsLost("there is no connection to the agents")
        ranks = [self._agents[port] for port in self._ports]
        seconds = self._limits.step_deadline(ints(plan.token_ids).size) + PATIENCE_SECONDS
        deadline = asyncio.get_running_loop().call_later(seconds, self._give_up, plan)
        try:
            answers = await asyncio.gather(*(agent.answer() for agent in ranks))
        except AgentsLost:
            await self.close()
            raise
        finally:
            deadline.cancel()
        outputs: list[StepOutput] = []
        for rank, (agent, answer) in enumerate(zip(ranks, answers, strict=True)):
            if isinstance(answer, StepError):
                raise StepFailed(f"the agent at {agent.address}: {answer.message}")
            if not isinstance(answer, StepOutput) or answer.step_id != plan.step_id:
                await self.close()
                raise AgentsLost(f"the agent at {agent.address} does not answer the plan that it was sent")
            outputs.append(answer)
            if answer.digest != outputs[0].digest:
                await self.close()
                raise AgentsLost(
                    f"rank {rank} (the agent at {agent.address}) differs from rank 0 in step {plan.step_id}"
                )
        return outputs[0]

    def _give_up(self, plan: StepPlan) -> None:
        for agent in self._agents.values():
            agent.give_up(f"step {plan.step_id} is overdue")

    async def close(self) -> None:
        """Close all connections; the agents then forget our requests and wait for the next server."""
        self._ready = False
        while self._agents:
            await self._agents.popitem()[1].close()

    async def _attach(self, port: int) -> None:
        """Connect to one agent and take it.

        Raises:
            OSError: it is not there, or not one of ours; the message names it.
        """
        address, secret = f"{self._host}:{port}", self._read_secret()
        try:
            attaching = _Agent.attach(self._host, port, secret)
            self._agents[port] = await asyncio.wait_for(attaching, ATTACH_SECONDS)
        except asyncio.TimeoutError:
            raise OSError(f"the agent at {address} does not answer") from None
        except EOFError:
            raise OSError(f"the agent at {address} closes the connection; has it the same secret file?") from None
        except OSError as error:
            raise OSError(f"the agent at {address}: {error.strerror or error}") from None

    def _read_secret(self) -> bytes:
        """The secret that the agents of now have: each start of theirs writes a new one."""
        try:
            return read_secret(self._secret_path)
        except SecretError as error:
            raise OSError(f"the secret file {error}") from None

    def _agree(self, hellos: Sequence[Hello]) -> Hello:
        """Check the greetings against the manifest and each other."""
        digest = self._manifest.digest()
        for rank, (port, hello) in enumerate(zip(self._ports, hellos, strict=True)):
            agent = f"the agent at {self._host}:{port}"
            if hello.manifest_digest != digest:
                raise AgentsRefused(f"{agent} runs another export of {hello.model}; restart the agents")
            if (hello.rank, hello.world_size) != (rank, len(hellos)):
                place = f"rank {hello.rank} of {hello.world_size}"
                raise AgentsRefused(f"{agent} is {place}; the configuration makes it rank {rank} of {len(hellos)}")
            if hello.num_blocks < 2:
                raise AgentsRefused(f"{agent} has no cache block to give; raise the model's cache_memory")
            if alike(hello) != alike(hellos[0]):
                raise AgentsRefused(f"{agent} was started with other limits than rank 0; restart the agents")
        return msgspec.structs.replace(hellos[0], num_blocks=min(hello.num_blocks for hello in hellos))


class _Agent:
    """The connection to one rank. A task of its own reads it, so that a loss is noticed whatever else waits.

    Attributes:
        lost: why there will be no more messages.
    """

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self.hello: Hello
        self._reader = reader
        self._writer = writer
        self._channel: Channel
        self.lost: AgentsLost | None = None
        self._messages: asyncio.Queue[Message | AgentsLost] = asyncio.Queue(MAX_UNREAD)
        self._silence = Silence(SILENCE_SECONDS)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def attach(cls, host: str, port: int, secret: bytes) -> _Agent:
        """Connect, greet and take the agent."""
        agent = cls(f"{host}:{port}", *await asyncio.open_connection(host, port))
        try:
            agent._channel = Channel(secret, "server")
            agent._writer.write(agent._channel.greeting)
            agent._channel.agree(await agent._reader.readexactly(GREETING.size))
            agent.send(Attach(pid=os.getpid()))
            while isinstance(hello := await agent._receive(), Heartbeat):
                pass  # it lives, and works on the last step of the server before
            if not isinstance(hello, Hello):
                raise ProtocolError(f"it greets with a {type(hello).__name__}")
            agent.hello = hello
            agent._tasks = [asyncio.create_task(agent._listen()), asyncio.create_task(agent._watch())]
        except BaseException:
            agent._writer.close()
            raise
        return agent

    def send(self, message: Message) -> None:
        self._writer.write(self._channel.seal(message))

    async def answer(self) -> Message:
        """The answer to a plan.

        Raises:
            AgentsLost: the connection broke or is silent; the message names the agent.
            AgentsTaken: it serves another server now.
        """
        message = await self._messages.get()
        if isinstance(message, AgentsLost):
            raise message
        return message

    def give_up(self, reason: str) -> None:
        """Take the connection for lost: no more is read."""
        self._reader.set_exception(OSError(reason))

    async def _listen(self) -> None:
        """Read messages until the connection is lost."""
        try:
            while not isinstance(message := await self._receive(), Replaced):
                if not isinstance(message, Heartbeat):
                    await self._messages.put(message)
            self.lost = AgentsTaken(f"at the agent at {self.address} replaced by the server with pid {message.pid}")
        except asyncio.IncompleteReadError:
            self.lost = AgentsLost(f"the agent at {self.address} closed the connection")
        except OSError as error:
            self.lost = AgentsLost(f"the agent at {self.address}: {error.strerror or error}")
        await self._messages.put(self.lost)

    async def _watch(self) -> None:
        """End the connection when nothing comes."""
        await self._silence.too_long()
        self.give_up(f"no sign of life for {SILENCE_SECONDS:g} s")

    async def _receive(self) -> Message:
        header = await self._read(HEADER.size)
        return self._channel.unseal(header, await self._read(self._channel.payload_size(header)))

    async def _read(self, size: int) -> bytes:
        """Exactly ``size`` bytes; each part of them is a sign of life."""
        data = bytearray()
        while len(data) < size:
            part = await self._reader.read(size - len(data))
            if not part:
                raise asyncio.IncompleteReadError(bytes(data), size)
            self._silence.broken()
            data += part
        return bytes(data)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.QueueFull):  # then there is something to wake who waits for an answer
            self._messages.put_nowait(AgentsLost(f"the connection to the agent at {self.address} is closed"))
        self._writer.transport.abort()  # what is unsent is of no use, and a stuck agent would never take it
        try:
            await self._writer.wait_closed()
        except OSError:
            _log.debug("the connection to the agent at %s was broken already", self.address)


def alike(hello: Hello) -> Hello:
    """What all agents of one model say alike, and an agent again after a restart."""
    return msgspec.structs.replace(hello, rank=0, pid=0, num_blocks=0)
