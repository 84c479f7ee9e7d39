"""The agent's door: it lets one authenticated server at a time through.

Peers that cannot prove in time that they know the secret are turned away in threads of their own, so they neither
disturb the server that is being served nor delay the next one.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading

from agent.connection import Connection

HANDSHAKE_SECONDS = 5.0
MAX_HANDSHAKES = 32  # at a time; more are turned away at once

logger = logging.getLogger(__name__)


class Listener:
    """Accepts connections on one address. The newest authenticated server replaces the one before."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        """Listen from now on.

        Raises:
            OSError: the address cannot be used.
        """
        self._secret = secret
        self._socket = bind(host, port)
        self._socket.listen()
        self._servers: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self._newest: Connection | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # a signal handler may close while closing
        self._handshakes = threading.Semaphore(MAX_HANDSHAKES)
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def next_server(self) -> Connection | None:
        """Wait for an authenticated server; None when the listener is closed."""
        return self._servers.get()

    def beat(self) -> None:
        """Give the server that has the agent a sign of life."""
        if server := self._newest:
            server.beat()

    def close(self) -> None:
        """Accept no more; the server that is being served gets its last answer. Signal handlers may call this."""
        with self._lock:
            self._closed.set()
            self._servers.put(None)
            if self._newest:
                self._newest.interrupt(writing=False)
        with contextlib.suppress(OSError):  # where only connections can be shut down, closing has to do
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def _accept(self) -> None:
        while not self.closed:
            try:
                accepted, address = self._socket.accept()
            except OSError as error:
                if not self.closed:
                    logger.error("cannot accept a connection: %s", error)
                self._closed.wait(0.1)  # too many open files pass; do not spin until then
                continue
            if not self._handshakes.acquire(blocking=False):
                logger.warning("turned %s away: too many handshakes at a time", address[0])
                accepted.close()
                continue
            threading.Thread(target=self._greet, args=(accepted, address[0]), daemon=True).start()

    def _greet(self, accepted: socket.socket, host: str) -> None:
        connection = Connection(accepted, self._secret)
        try:
            attach = connection.authenticate(HANDSHAKE_SECONDS)
        except OSError as error:
            logger.warning("turned %s away: %s", host, error)
            connection.close()
            return
        finally:
            self._handshakes.release()
        logger.info("the server with pid %d on %s has attached", attach.pid, host)
        with self._lock:
            before, self._newest = self._newest, connection
            self._servers.put(connection)
        if before:
            before.replace(attach.pid)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet.

    Raises:
        OSError: the address is busy or not one of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of an agent that has just gone
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
