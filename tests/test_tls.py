"""An app that speaks TLS, and what becomes of more connections than it has room for."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from http.client import HTTPResponse, HTTPSConnection
from pathlib import Path

import httpx
import pytest
import trustme
from serving_processes import ROOT, Process, Serving, eventually, serving, standin_deployment

from client.http_connection import SPARE_CONNECTIONS
from client.tls import server_tls
from config.server_config import ServerConfig
from config.serving_config import ConfigError

MAX_CONNECTIONS = 3


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The keys of ``server`` for a certificate of this machine."""
    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "certificate.pem", append=True)
    return {"tls_certificate": str(folder / "certificate.pem"), "tls_key": str(folder / "key.pem")}


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """What a client needs to believe the app."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="module")
def secured(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    server = {**files, "keep_alive_seconds": 60}
    limits = {"max_connections": MAX_CONNECTIONS}
    with serving(tmp_path_factory.mktemp("secured"), server=server, limits=limits) as deployment:
        yield deployment


def url_of(deployment: Serving) -> str:
    return deployment.url.replace("http:", "https:")


def test_requests_and_streams_go_over_tls(secured: Serving, trusting: ssl.SSLContext) -> None:
    with httpx.Client(base_url=url_of(secured), verify=trusting, trust_env=False) as client:
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 3}}
        answer = client.post("/models/llama2", json=body).json()["generated_text"]
        assert answer in client.post("/models/llama2/generate_stream", json=body).text


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_is_of_a_version_that_is_safe(secured: Serving, authority: trustme.CA, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    connection = socket.create_connection(("127.0.0.1", secured.port), timeout=20)
    with context.wrap_socket(connection, server_hostname="127.0.0.1") as secure:
        assert secure.version() == version.name.replace("_", ".")


def test_older_tls_is_not_spoken(files: dict[str, str]) -> None:
    context = server_tls(ServerConfig(**files))  # type: ignore[arg-type]  # they are all texts
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_plain_http_is_not_answered(secured: Serving) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{secured.url}/health", trust_env=False)


@pytest.mark.parametrize(
    ("certificate", "key", "problem"),
    [
        ("certificate.pem", "missing.pem", "server.tls_key: .*missing.pem: cannot be read: No such file"),
        ("missing.pem", "key.pem", "server.tls_certificate: .*missing.pem: cannot be read"),
        ("key.pem", "key.pem", "are no certificate and its key"),
        ("certificate.pem", "other.pem", "are no certificate and its key: KEY_VALUES_MISMATCH"),
        ("certificate.pem", "empty.pem", "are no certificate and its key"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    files: dict[str, str], tmp_path: Path, certificate: str, key: str, problem: str
) -> None:
    for name in ("certificate.pem", "key.pem"):
        shutil.copy(Path(files["tls_key"]).parent / name, tmp_path)
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "empty.pem").touch()
    server = ServerConfig(tls_certificate=str(tmp_path / certificate), tls_key=str(tmp_path / key))
    with pytest.raises(ConfigError, match=problem):
        server_tls(server)


def test_too_many_connections_are_told_so_and_may_ask_for_health(secured: Serving, trusting: ssl.SSLContext) -> None:
    with contextlib.ExitStack() as opened:

        def connect() -> HTTPSConnection:
            connection = HTTPSConnection("127.0.0.1", secured.port, context=trusting, timeout=20)
            return opened.enter_context(contextlib.closing(connection))

        assert [ask(connect(), "/metrics").status for _ in range(MAX_CONNECTIONS)] == [200] * MAX_CONNECTIONS
        surplus = connect()
        assert ask(surplus, "/health/live").status == 200
        refusal = ask(surplus, "/metrics")
        assert (refusal.status, refusal.headers["retry-after"], refusal.headers["connection"]) == (429, "1", "close")
        spare = [connect() for _ in range(SPARE_CONNECTIONS + 1)]
        for connection in spare:
            connection.connect()
        assert ask(spare[0], "/health/live").status == 200
        with pytest.raises(ConnectionError):  # one more than the spare ones is closed without a word
            ask(spare[-1], "/health/live")
    with httpx.Client(base_url=url_of(secured), verify=trusting, trust_env=False) as client:
        eventually(lambda: client.get("/metrics").status_code == 200)


def ask(connection: HTTPSConnection, path: str) -> HTTPResponse:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response


@pytest.mark.slow  # it starts a whole deployment for one line
def test_the_first_request_that_is_shown_works(files: dict[str, str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("# a key\na-key-that-is-long-enough\n")
    deployment = standin_deployment(tmp_path, server={**files, "api_key_file": str(keys)})
    started = Process("start.py", "--config", deployment.config_path)
    try:
        started.wait_for("try: curl")
        [line] = [line for line in started.lines if line.startswith("try: ")]
        shown = subprocess.run(line.removeprefix("try: "), shell=True, capture_output=True, text=True, cwd=ROOT)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith('data: {"event": "message"')
    finally:
        started.stop()
