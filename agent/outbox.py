"""Answers on their way to a server, in a thread of their own: the model runs the next step meanwhile."""

from __future__ import annotations

import queue
import threading

from agent.connection import Connection
from agent.protocol import Message


class Outbox:
    """Sends messages in order. Use it as a context; when it ends, all of them are sent or the connection is broken."""

    def __init__(self, server: Connection) -> None:
        self._server = server
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)

    def __enter__(self) -> Outbox:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._messages.put(None)
        self._thread.join()

    def put(self, message: Message) -> None:
        """Send ``message`` as soon as those before it are sent.

        Raises:
            OSError: an earlier one could not be sent.
        """
        if self._error:
            raise self._error
        self._messages.put(message)

    def _send(self) -> None:
        try:
            while message := self._messages.get():
                self._server.send(message)
        except OSError as error:
            self._error = error
