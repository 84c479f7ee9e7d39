"""A server's end of a connection to an agent, for tests: blocking, without a scheduler."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType

from agent.protocol import (
    GREETING,
    HEADER,
    Attach,
    Channel,
    Heartbeat,
    Hello,
    Message,
    StepError,
    StepOutput,
    StepPlan,
    ints,
)

SECONDS = 30.0  # far more than any answer takes


class AgentClient:
    """A connection on which ``attach`` takes the agent and ``run`` has plans run."""

    def __init__(self, port: int, secret: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self.channel = Channel(secret, "server")

    def greet(self) -> None:
        self.socket.sendall(self.channel.greeting)
        self.channel.agree(self.read(GREETING.size))

    def attach(self) -> Hello:
        self.greet()
        self.send(Attach(pid=1))
        hello = self.receive()
        assert isinstance(hello, Hello)
        return hello

    def run(self, plan: StepPlan) -> StepOutput:
        self.send(plan)
        answer = self.receive()
        assert isinstance(answer, StepOutput), answer
        assert answer.step_id == plan.step_id
        return answer

    def tokens(self, plan: StepPlan) -> list[int]:
        return ints(self.run(plan).token_ids).tolist()

    def refused(self, plan: StepPlan) -> str:
        """Why the agent did not run the plan."""
        self.send(plan)
        answer = self.receive()
        assert isinstance(answer, StepError), answer
        assert answer.step_id == plan.step_id
        return answer.message

    def send(self, message: Message) -> None:
        self.socket.sendall(self.channel.seal(message))

    def receive(self) -> Message:
        """The next message that is not a sign of life."""
        while isinstance(message := self._receive(), Heartbeat):
            pass
        return message

    def _receive(self) -> Message:
        header = self.read(HEADER.size)
        return self.channel.unseal(header, self.read(self.channel.payload_size(header)))

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes; EOFError if the agent closes the connection instead."""
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError("the agent closed the connection")
            data += part
        return data

    def is_closed(self) -> bool:
        """Whether the agent closes the connection now (waits for it)."""
        try:
            while self.socket.recv(4096):
                pass  # signs of life
            return True
        except ConnectionResetError:
            return True

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


def attached(port: int, secret_file: Path) -> AgentClient:
    """A client that has the agent."""
    client = AgentClient(port, secret_file.read_bytes())
    try:
        client.attach()
    except BaseException:
        client.socket.close()
        raise
    return client
