"""Who may ask: the keys of ``server.api_key_file``, and the guard before all routes but the open ones."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from client.routes.problem import Problem
from config.secret_file import SecretError, read_private
from config.serving_config import ConfigError

MAX_FILE_BYTES = 64 << 10
SHORTEST_KEY = 16  # characters; python -c 'import secrets; print(secrets.token_urlsafe())' makes one of 43
OPEN_PATHS = ("/health", "/ui")  # with all below them: probes have no key, and the page asks its user for one

logger = logging.getLogger(__name__)
_KEY = re.compile(rf"[!-~]{{{SHORTEST_KEY},}}")  # what can stand in a header, without spaces
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)


class ApiKeys:
    """The keys of a file, one a line, read again when it changes; empty lines and ``#`` comments are left out.

    Only hashes are kept. They are compared in constant time, all of them, so that nothing is learnt from how long it
    takes.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._stamp = self._look()
        try:
            self._hashes = self._read()
        except SecretError as error:
            raise ConfigError(f"server.api_key_file: {error}") from None

    def allow(self, key: str) -> bool:
        """Whether ``key`` is one of them now."""
        self._refresh()
        given = _hash(key)
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0

    def _refresh(self) -> None:
        """Read the file again if it has changed. One that cannot be used changes nothing, and the log says so once."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._hashes = self._read()
            logger.info("%s: %d keys", self._path, len(self._hashes))
        except SecretError as error:
            logger.error("the API keys stay as they were: %s", error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> list[bytes]:
        content = read_private(self._path, MAX_FILE_BYTES)
        lines = [line.strip() for line in content.decode("utf-8", "replace").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise SecretError(f"{self._path}: holds no key")
        for number, key in enumerate(keys, 1):
            if not _KEY.fullmatch(key):
                rule = f"at least {SHORTEST_KEY} characters of printable ASCII, without spaces"
                raise SecretError(f"{self._path}: key {number} is no key: it needs {rule}")
        return [_hash(key) for key in keys]


class KeyGuard:
    """ASGI middleware: a request needs ``Authorization: Bearer KEY``, unless its path is an open one."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        given = _BEARER.fullmatch(Headers(scope=scope).get("authorization", ""))
        if given and self._keys.allow(given[1]):
            await self._app(scope, receive, send)
            return
        message = "this API key is not known" if given else "an API key is needed: Authorization: Bearer KEY"
        refusal = Problem(status=401, message=message, headers={"WWW-Authenticate": "Bearer"})
        await refusal.response(scope["path"])(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether everybody may ask for ``path``."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in OPEN_PATHS)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
