"""One server's connection, as the agent sees it: messages over a blocking socket."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from agent.protocol import GREETING, HEADER, Attach, Channel, Heartbeat, Message, ProtocolError, Replaced

FAREWELL_SECONDS = 10.0  # for the step that runs when another server comes, and the last frame


class Connection:
    """An accepted socket with its channel. One thread reads and writes, others ``beat``, ``interrupt``, ``replace``.

    Attributes:
        replaced_by: the process id of the server that has taken the agent from this one.
    """

    def __init__(self, accepted: socket.socket, secret: bytes) -> None:
        self._socket = accepted
        self._channel = Channel(secret, "agent")
        self._deadline: float | None = None
        self._closed = threading.Event()
        self._sending = threading.Lock()  # frames are sealed and sent in one order
        self.replaced_by: int | None = None

    def authenticate(self, seconds: float) -> Attach:
        """Exchange greetings and take the first frame, all within ``seconds``.

        Raises:
            OSError: the peer is too slow, went away, or does not know the secret.
        """
        self._deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(self._channel.greeting)
        self._channel.agree(self._read(GREETING.size))
        first = self.receive()
        if not isinstance(first, Attach):
            raise ProtocolError("a server has to attach first")
        self._deadline = None
        self._socket.settimeout(None)
        return first

    def receive(self) -> Message | None:
        """The next message; None if the peer has closed the connection."""
        header = self._read(HEADER.size, may_end=True)
        if not header:
            return None
        return self._channel.unseal(header, self._read(self._channel.payload_size(header)))

    def send(self, message: Message) -> None:
        with self._sending:
            self._socket.sendall(self._channel.seal(message))

    def beat(self) -> None:
        """Send a sign of life, without waiting: while an answer is sent, or none is taken, there is no need for one."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            writable = select.poll()
            if not self._closed.is_set():
                writable.register(self._socket, select.POLLOUT)
                if writable.poll(0):  # then there is room for a frame as small as this
                    self._socket.sendall(self._channel.seal(Heartbeat()))
        except OSError:
            pass  # the thread that reads finds out as well, and says so
        finally:
            self._sending.release()

    def interrupt(self, *, writing: bool) -> None:
        """Wake the thread that reads: it finds the connection closed. With ``writing``, answers fail as well."""
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR if writing else socket.SHUT_RD)

    def replace(self, pid: int) -> None:
        """Let the thread that reads say farewell and close; a peer that does not take its last answer is cut off."""
        self.replaced_by = pid
        self.interrupt(writing=False)
        if not self._closed.wait(FAREWELL_SECONDS):
            self.interrupt(writing=True)

    def close(self) -> None:
        """Close the connection, and tell a server that is replaced by whom."""
        if self.replaced_by is not None:
            with contextlib.suppress(OSError):  # it has gone
                self.send(Replaced(pid=self.replaced_by))
        with self._sending:
            self._closed.set()
            self._socket.close()

    def _read(self, size: int, *, may_end: bool = False) -> bytes:
        """Exactly ``size`` bytes, or none at all where the stream ``may_end``."""
        data, filled = bytearray(size), 0
        while filled < size:
            if self._deadline is not None:  # a peer that sends byte by byte does not get more time
                self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
            received = self._socket.recv_into(memoryview(data)[filled:])
            if not received:
                if may_end and not filled:
                    return b""
                raise ProtocolError("the other side closed the connection inside a frame")
            filled += received
        return bytes(data)
