"""The certificate that the app shows, where its port speaks TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from config.server_config import ServerConfig
from config.serving_config import ConfigError


def server_tls(server: ServerConfig) -> ssl.SSLContext | None:
    """What ``server.tls_certificate`` and ``server.tls_key`` make, for TLS 1.2 and later; None without them.

    Raises:
        ConfigError: one of them cannot be read, or they do not belong together.
    """
    if server.tls_certificate is None or server.tls_key is None:
        return None
    for key, path in (("tls_certificate", server.tls_certificate), ("tls_key", server.tls_key)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"server.{key}: {path}: cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password function an encrypted key would ask for its password on the terminal
        context.load_cert_chain(server.tls_certificate, server.tls_key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "it is encrypted, or no PEM file"
        files = f"{server.tls_certificate} and {server.tls_key}"
        raise ConfigError(f"server.tls_key: {files} are no certificate and its key: {reason}") from None
    return context
