"""One call to a server, whichever way it waits: what is sent, how often, how long for what, and what went wrong."""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Generator, Mapping

import httpx

from client.client_errors import BrokenAnswer, ClientClosed, ClientError, NoConnection, TimedOut, refusal
from client.json_request import encoded
from client.patience import Wait, Watch
from client.remote_server import Server

_LATE: dict[Wait, str] = {
    "connect": "no connection to {url} within {seconds}; see that the address is right and the server is up",
    "first_token": "{url} sent no token within {seconds}; it may have much to do",
    "between_tokens": "{url} sent nothing more for {seconds}, and the answer is not complete",
    "answer": "{url} sent nothing for {seconds}; it may have much to do, and a stream shows what there is",
}


class Call:
    """What both kinds of session do alike; what blocks or is awaited is theirs.

    Attributes:
        wait: which of the timeouts is running.
    """

    def __init__(self, server: Server, path: str, body: Mapping[str, object] | None, wait: Wait) -> None:
        """``wait``: for the answer's first byte, its headers.

        Raises:
            InvalidRequest: the body cannot be written.
        """
        self.wait = wait
        self._server = server
        self._path = path
        self._content = None if body is None else encoded(body)
        self._tried = 0
        self._since = 0.0

    def request(
        self, http: httpx.Client | httpx.AsyncClient, trace: Callable[..., object] | None = None
    ) -> httpx.Request:
        """The request for one more try, which begins now."""
        self._tried += 1
        self._since = time.monotonic()
        connect, read = self._server.timeouts.connect, self._server.timeouts.of(self.wait)
        return http.build_request(
            "GET" if self._content is None else "POST",
            self._path,
            content=self._content,
            headers=None if self._content is None else {"Content-Type": "application/json"},
            timeout=httpx.Timeout(connect=connect, read=read, write=read, pool=connect),
            extensions=None if trace is None else {"trace": trace},
        )

    def accept(self, response: httpx.Response) -> None:
        """Take ``response``, the body of which has been read unless its status is 200.

        Raises:
            ClientError: it is a refusal.
        """
        if response.status_code != httpx.codes.OK:
            raise refusal(response.status_code, response.headers, response.content)

    def pause(self, error: ClientError) -> float:
        """Seconds until the next try after one that ended with ``error``, which is raised if it was the last."""
        if (wait := self._server.retries.wait(self._tried, error)) is None:
            raise error
        return wait

    def time_the_body(self, response: httpx.Response) -> None:
        """Make ``left`` the only limit from here on: httpx counts anew at each read, and knows one limit for all."""
        response.request.extensions["timeout"]["read"] = None

    def left(self) -> float | None:
        """Seconds until patience ends; None: never."""
        seconds = self._server.timeouts.of(self.wait)
        return None if seconds is None else max(0.0, self._since + seconds - time.monotonic())

    def goes_on(self) -> None:
        """A token came, and the next one is waited for from now."""
        self.wait, self._since = "between_tokens", time.monotonic()

    @contextlib.contextmanager
    def errors(self, closed: threading.Event, watch: Watch | None = None) -> Generator[None, None, None]:
        """What goes wrong inside, in our words. ``closed``: so is the session."""
        if closed.is_set():
            raise _closed()
        try:
            yield
        except (httpx.RequestError, RuntimeError, OSError) as error:
            if closed.is_set():
                raise _closed() from error
            if isinstance(error, RuntimeError | OSError) and not isinstance(error, TimeoutError):
                raise
            if watch is None or not watch.ran_out:
                raise self._error(error) from error
        if watch is not None and watch.ran_out:
            raise self._late(self.wait)

    def _error(self, error: Exception) -> ClientError:
        url = self._server.url
        if isinstance(error, httpx.ConnectTimeout):
            return self._late("connect")
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            return self._late(self.wait)
        cause = _system_error(error)
        text = (_words(cause) if cause else str(error)) or type(error).__name__
        if isinstance(error, httpx.ConnectError):
            found = NoConnection(f"no connection to {url}: {text}")
            found.lasting = isinstance(cause, ssl.SSLError)
            return found
        return BrokenAnswer(f"the connection to {url} broke: {text}")

    def _late(self, wait: Wait) -> ClientError:
        limit = self._server.timeouts.of(wait)
        seconds = "the time that the system gives it" if limit is None else f"{limit:g} seconds"
        text = _LATE[wait].format(url=self._server.url, seconds=seconds)
        if limit is not None:
            text += f". A longer timeout ({wait}) waits longer"
        return NoConnection(text) if wait == "connect" else TimedOut(text)


def _closed() -> ClientClosed:
    return ClientClosed("this client is closed; make a new one, or close it after the last answer")


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said, from which all else came: the text of httpx's own error may be nothing but a name."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        several = getattr(error, "exceptions", None)  # one for each address of the server
        error = several[0] if several else error.__cause__ or error.__context__
    return error


def _words(error: OSError) -> str:
    """asyncio has words of its own for what the system says, which do not even say whether it was refused."""
    if isinstance(error, ssl.SSLError):
        return str(error)
    of_system = error.errno is not None and error.errno > 0  # looking up an address has other numbers
    return os.strerror(error.errno or 0) if of_system else str(error.strerror)
