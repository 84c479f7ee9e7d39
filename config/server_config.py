"""The HTTP side of a deployment: where it listens, who may ask, and how long a client may take."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterator
from typing import Annotated

import msgspec

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The app's port and what stands before its routes."""

    host: str = "127.0.0.1"
    port: Port = 9811
    allow_remote: bool = False  # a host other than loopback must be asked for
    api_key_file: str | None = None  # None: whoever reaches the port may use it
    allow_without_key: bool = False  # on a host other than loopback
    tls_certificate: str | None = None  # PEM, the server's own first; None: plain HTTP
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()  # of the web pages that may call from a browser
    receive_timeout_seconds: PositiveSeconds = 30.0  # for a whole request to arrive
    keep_alive_seconds: Positive = 5  # that a connection may be idle between two requests
    drain_seconds: Seconds = 30.0

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_certificate else 'http'}://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server_problems(server: ServerConfig) -> Iterator[str]:
    """What the types cannot say: each problem names its key."""
    for key in ("drain_seconds", "receive_timeout_seconds"):
        if not math.isfinite(getattr(server, key)):
            yield f"server.{key}: needs a finite number"
    if not (is_loopback(server.host) or server.api_key_file or server.allow_without_key):
        yield (
            f"server.api_key_file: {server.host} is not loopback, so requests need a key; "
            "set server.allow_without_key: true if everyone who reaches the port may use the models"
        )
    if bool(server.tls_certificate) != bool(server.tls_key):
        missing = "tls_key" if server.tls_certificate else "tls_certificate"
        yield f"server.{missing}: TLS needs a certificate and its key"
    for origin in server.cors_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            yield f"server.cors_origins: {origin!r} is no origin; write it like https://chat.example.org, or '*'"
