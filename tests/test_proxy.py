"""nginx in front, with the lines of docs/deployment.md: streams arrive step by step, clients that leave are noticed."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_processes import ROOT, START_SECONDS, Serving, eventually

from config.free_ports import free_ports

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {
    "inputs": "hi",
    "parameters": {"ignore_eos": True, "max_new_tokens": 4000, "return_full_text": False},
}
FRAME = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {lines}
}}
"""


def documented_lines(app_port: int, proxy_port: int, folder: Path) -> str:
    """The document's lines; each place that is this test's own is changed once."""
    [lines] = re.findall(
        r"^```nginx\n(.*?)^```$", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE | re.DOTALL
    )
    for old, new in [
        ("127.0.0.1:9811", f"127.0.0.1:{app_port}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{proxy_port} ssl"),
        ("/etc/ssl/llm/fullchain.pem", f"{folder}/certificate.pem"),
        ("/etc/ssl/llm/key.pem", f"{folder}/key.pem"),
    ]:
        assert lines.count(old) == 1, old
        lines = lines.replace(old, new)
    return lines


def make_certificate(folder: Path) -> None:
    """One of its own for localhost."""
    assert shutil.which("openssl"), "openssl is not installed; on Debian: apt install openssl"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "1"]
    command += ["-keyout", f"{folder}/key.pem", "-out", f"{folder}/certificate.pem"]
    subprocess.run(command, check=True, capture_output=True)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def proxy(slow_standin: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client that reaches the slow stand-in through nginx and TLS."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert program, "nginx is not installed; on Debian: apt install nginx-light"
    folder = tmp_path_factory.mktemp("nginx")
    make_certificate(folder)
    [port] = free_ports(1)
    configuration = folder / "nginx.conf"
    lines = documented_lines(slow_standin.port, port, folder)
    configuration.write_text(FRAME.format(folder=folder, lines=lines), encoding="utf-8")
    with subprocess.Popen([program, "-p", folder, "-c", configuration]) as process:
        try:
            eventually(lambda: is_open(port) or process.poll() is not None)
            assert process.poll() is None, (folder / "error.log").read_text()
            trust = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
            url = f"https://localhost:{port}"
            with httpx.Client(base_url=url, verify=trust, timeout=START_SECONDS, trust_env=False) as client:
                yield client
        finally:
            process.terminate()
    assert "[error]" not in (folder / "error.log").read_text()


def running(client: httpx.Client) -> int:
    """Rows of the step that runs."""
    [number] = re.findall(r'"data": (\d+)', client.get("/serving/get_bs").text)
    return int(number)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/models/llama2/generate_stream", LONG),
        ("/models/llama2/generate_stream", {**LONG, "parameters": {**LONG["parameters"], "return_protocol": "lines"}}),
        ("/generate_stream", {"inputs": "long 69", "parameters": {"max_new_tokens": 300}}),  # ends after two seconds
    ],
    ids=["events", "lines", "tgi"],
)
def test_steps_arrive_while_the_next_ones_are_made(
    proxy: httpx.Client, slow_standin: Serving, path: str, body: dict[str, Any]
) -> None:
    direct = slow_standin.client()
    with proxy.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        chunks = response.iter_raw()
        for _ in range(5):
            assert next(chunks)
            assert running(direct) == 1  # a buffer would hold this step until the answer is over
    eventually(lambda: running(direct) == 0)


def test_a_whole_answer_comes_through(proxy: httpx.Client, slow_standin: Serving) -> None:
    body = {"inputs": "你好" * 1000, "parameters": {"max_new_tokens": 5}}
    through = proxy.post("/models/llama2", json=body)
    assert through.content == slow_standin.client().post("/models/llama2", json=body).content
    assert proxy.post("/generate", json={"inputs": ""}).status_code == 422


def test_a_client_that_leaves_the_proxy_ends_its_request(proxy: httpx.Client, slow_standin: Serving) -> None:
    direct = slow_standin.client()
    with proxy.stream("POST", "/models/llama2/generate_stream", json=LONG) as response:
        chunks = response.iter_raw()
        next(chunks)
        assert running(direct) == 1
    eventually(lambda: running(direct) == 0)


def test_the_request_id_goes_through_and_comes_back(proxy: httpx.Client, slow_standin: Serving) -> None:
    given = proxy.post("/models/llama2", json={"inputs": "x"}, headers={"x-request-id": "through-nginx-1"})
    assert given.headers["x-request-id"] == "through-nginx-1"
    eventually(lambda: proxy.get("/health").is_success and "through-nginx-1 POST" in slow_standin.log)
    made = {proxy.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
