"""A foreign HTTP server that answers from a script: it refuses once, stalls or breaks off, as none does on demand."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

STALL = b"(stall)"  # in a script: nothing more comes until the client has left
PAUSE, PAUSE_SECONDS = b"(pause)", 1.0  # in a script: nothing comes for so long


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    line: str
    headers: dict[str, str]
    body: Any


@dataclass
class ScriptedServer:
    """Answers one request of a connection after another, each with the next script; the last one is repeated."""

    url: str
    scripts: Sequence[Sequence[bytes]]
    requests: list[Request] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))  # one for each request
    left: threading.Event = field(default_factory=threading.Event)  # a client has closed a stalled connection

    def serve(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            threading.Thread(target=self._answer, args=(connection, context), daemon=True).start()

    def _answer(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
            closing.enter_context(connection)
            if context is not None:
                connection = closing.enter_context(context.wrap_socket(connection, server_side=True))
            while request := _read(connection):
                script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
                self.requests.append(request)
                self.arrived.release()
                for part in script:
                    if part == STALL:
                        with contextlib.suppress(OSError):
                            connection.recv(1)
                        self.left.set()
                        return
                    if part == PAUSE:
                        time.sleep(PAUSE_SECONDS)
                    else:
                        connection.sendall(part)
                if not script[-1].endswith(b"0\r\n\r\n") and b"Content-Length" not in script[0]:
                    return


@contextlib.contextmanager
def scripted(*scripts: Sequence[bytes], context: ssl.SSLContext | None = None) -> Iterator[ScriptedServer]:
    """A server on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        scheme = "http" if context is None else "https"
        server = ScriptedServer(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", scripts)
        serving = threading.Thread(target=server.serve, args=(listener, context), daemon=True)
        serving.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            serving.join()


def plain(status: int, body: str, *headers: str) -> list[bytes]:
    """An answer in one piece."""
    content = body.encode()
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(content)}", *headers]
    return ["\r\n".join([*head, "", ""]).encode() + content]


def stream(*events: object, end: bytes = b"0\r\n\r\n") -> list[bytes]:
    """A stream of ``data:`` events, each a chunk; strings stand as they are, and so does ``PAUSE``."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *map(_chunk, events), end]


def _chunk(event: object) -> bytes:
    if event == PAUSE:
        return PAUSE
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def self_signed(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A new certificate of 127.0.0.1 that nobody else has signed, and a server's context with it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    certificate, key = folder / "server.pem", folder / "server.key"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", *kind, "-out", str(certificate), *names], check=True, capture_output=True
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return certificate, context


def _read(connection: socket.socket) -> Request | None:
    """The next request; None if the client has left."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(1 << 16)):
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(1 << 16)
    return Request(line, headers, json.loads(body) if body else None)
