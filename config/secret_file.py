"""Files that only their owner can read, and the secret that the app and the agents of a model share in one."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

SECRET_BYTES = 32
LONGEST_SECRET = 64  # what a BLAKE2b key can hold


class SecretError(ValueError):
    """The file is not one to trust."""


def create_secret(path: Path) -> None:
    """Put a new secret at ``path``, in the place of an old one; a reader finds one of them, whole."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "wb") as output:
        output.write(secrets.token_bytes(SECRET_BYTES))
    fresh.replace(path)


def read_secret(path: Path) -> bytes:
    """The secret at ``path``.

    Raises:
        SecretError: it is missing, others can read it, or it is too short or too long.
    """
    secret = read_private(path, LONGEST_SECRET)
    if len(secret) < SECRET_BYTES:
        raise SecretError(f"{path}: holds {len(secret)} bytes; a secret has {SECRET_BYTES} to {LONGEST_SECRET}")
    return secret


def read_private(path: Path, longest: int) -> bytes:
    """The content of a file of at most ``longest`` bytes that only its owner can read.

    Raises:
        SecretError: it is missing, others can read it, or it is too long.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(longest + 1)
    except OSError as error:
        raise SecretError(f"{path}: cannot be read: {error.strerror}") from None
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretError(f"{path}: other users can read it; run chmod 600 on it")
    if len(content) > longest:
        raise SecretError(f"{path}: holds {status.st_size} bytes; at most {longest} can be used")
    return content
