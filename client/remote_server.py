"""Where a server is, and how it is to be spoken to."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from client.patience import RETRIES, TIMEOUTS, Retries, Timeouts
from config.version import __version__

IDLE_SECONDS = 2.0  # an idle connection is kept for less long than servers keep theirs, so none is lost to a race
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Server:
    """A server, with the patience that its caller has.

    Raises:
        ValueError: the URL or the key cannot be used.
        OSError: the certificates cannot be read.
    """

    url: str  # http://127.0.0.1:9811
    token: str | None = field(default=None, repr=False)  # the API key
    ca: str | Path | None = None  # a file of certificates to trust instead of the usual ones
    timeouts: Timeouts = TIMEOUTS
    retries: Retries = RETRIES

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{self.url!r} is not the URL of a server, such as http://127.0.0.1:9811")
        if parts.query or parts.fragment:
            raise ValueError(f"{self.url!r}: the URL of a server ends with its path, before any ? or #")
        try:
            httpx.URL(self.url).raw_host.decode().encode("idna")  # what looking its address up will do
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"{self.url!r} is not the URL of a server: {error}") from None
        if self.token is not None and not _may_be_a_key(self.token):
            raise ValueError("an API key is made of printable ASCII characters, with no space around them")

    def settings(self) -> dict[str, Any]:
        """What httpx is to be told."""
        headers = {"User-Agent": f"mindspore-llm-serving/{__version__}", "Accept-Encoding": "identity"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return {
            "base_url": self.url,
            "headers": headers,
            "verify": True if self.ca is None else ssl.create_default_context(cafile=self.ca),
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
            "trust_env": urlsplit(self.url).hostname not in LOOPBACK,  # no proxy leads to this machine
        }


def _may_be_a_key(token: str) -> bool:
    return bool(token) and token.isascii() and token.isprintable() and token == token.strip()
