"""How the app starts, drains and ends, alone and with its agents (``start.py``), through real processes and signals."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from legacy_client import ask, event_text, events, lines
from serving_processes import ROOT, Process, Serving, eventually, serving, standin_deployment

from agent.arithmetic_model import answer
from config.free_ports import free_ports
from config.serving_config import load
from config.version import __version__

APP = "client/server_app_post.py"
SLOW = {"step_seconds": 0.02}
END_SECONDS = 15.0  # far less than the drain that must not be waited for


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Serving]:
    """A slow deployment with a long drain, to be stopped by the test."""
    with serving(tmp_path, [SLOW], server={"drain_seconds": 60.0}) as started:
        yield started


def app_of(deployment: Serving) -> Process:
    assert deployment.app is not None
    return deployment.app


def long_body(protocol: str = "sse", tokens: int = 4000) -> dict[str, object]:
    parameters = {"ignore_eos": True, "max_new_tokens": tokens, "return_full_text": False, "return_protocol": protocol}
    return {"inputs": "hi", "parameters": parameters}


def test_the_app_may_start_before_its_agents(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    try:
        deployment.app = Process(APP, "--config", deployment.config_path)
        deployment.app.wait_for("waiting for the agents of llama2, internlm at 127.0.0.1:")
        client = deployment.client()
        assert client.get("/health/live").status_code == 200
        for response in (
            client.get("/health/ready"),
            client.get("/health"),
            client.post("/models/llama2", json=long_body()),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
            assert "127.0.0.1:" in response.json()["error"]
        deployment.start_agents()
        deployment.app.wait_for("mindspore serving is started.")
        assert client.get("/health/ready").status_code == 200
        assert ask(client, "hi", max_new_tokens=4) == {"generated_text": answer("hi", 4)}
    finally:
        deployment.stop()


def test_a_drain_finishes_what_runs_and_takes_nothing_new(deployment: Serving) -> None:
    client = deployment.client()
    expected = client.post("/models/llama2", json=long_body(tokens=100)).json()["generated_text"]
    with client.stream("POST", "/models/llama2/generate_stream", json=long_body(tokens=100)) as response:
        chunks = response.iter_raw()
        content = next(chunks)
        app_of(deployment).send(signal.SIGTERM)
        eventually(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 200
        refused = client.post("/models/llama2", json=long_body())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        content += b"".join(chunks)
    assert event_text(content) == expected
    assert app_of(deployment).wait() == 0
    assert deployment.agents is not None
    assert deployment.agents.children()  # agents outlive the app


@pytest.mark.slow
def test_a_drain_goes_on_when_an_agent_dies_in_it(deployment: Serving) -> None:
    client = deployment.client()
    expected = client.post("/models/llama2", json=long_body(tokens=100)).json()["generated_text"]
    assert deployment.agents is not None
    [agent] = deployment.agents.children()
    with client.stream("POST", "/models/llama2/generate_stream", json=long_body(tokens=100)) as response:
        chunks = response.iter_raw()
        content = next(chunks)
        app_of(deployment).send(signal.SIGTERM)
        eventually(lambda: client.get("/health/ready").status_code == 503)
        agent.kill()
        content += b"".join(chunks)
    assert event_text(content) == expected
    assert app_of(deployment).wait() == 0


@pytest.mark.slow
def test_a_drain_ends_in_time_when_the_agents_are_gone(tmp_path: Path) -> None:
    with serving(tmp_path, [SLOW], server={"drain_seconds": 2.0}) as deployment:
        client = deployment.client()
        with client.stream("POST", "/models/llama2/generate_stream", json=long_body()) as response:
            chunks = response.iter_raw()
            content = next(chunks)
            app_of(deployment).send(signal.SIGTERM)
            assert deployment.agents is not None
            deployment.agents.send(signal.SIGKILL)
            content += b"".join(chunks)
        assert "shutting down" in events(content)[-1]["data"]
        assert app_of(deployment).wait(END_SECONDS) == 0


def test_what_is_not_finished_in_time_ends_with_a_reason(tmp_path: Path) -> None:
    with serving(tmp_path, [SLOW], server={"drain_seconds": 0.5}) as deployment, ThreadPoolExecutor() as threads:
        client = deployment.client()
        calls = {
            protocol: threads.submit(client.post, "/models/llama2/generate_stream", json=long_body(protocol))
            for protocol in ("sse", "lines")
        }
        full = threads.submit(client.post, "/models/llama2", json=long_body())
        body = {"inputs": "long 69", "parameters": {"max_new_tokens": 300}}  # the stand-in says much to this
        tgi = [threads.submit(client.post, path, json=body) for path in ("/generate_stream", "/generate")]
        eventually(lambda: b'"data": 5}' in client.get("/serving/get_bs").content)
        app_of(deployment).send(signal.SIGINT)
        *steps, last = events(calls["sse"].result().content)
        assert steps
        assert last == {"event": "error", "retry": 30000, "data": last["data"]}
        assert "shutting down" in last["data"]
        *steps, last = lines(calls["lines"].result().content)
        assert steps
        assert set(last) == {"error"}
        assert "shutting down" in last["error"]
        assert full.result().status_code == 503
        assert set(full.result().json()) == {"error", "field"}
        *steps, last = [json.loads(event[5:]) for event in tgi[0].result().content.split(b"\n\n")[:-1]]
        assert steps
        assert last == {"error": last["error"], "error_type": "unavailable"}
        assert (tgi[1].result().status_code, tgi[1].result().json()) == (503, last)
        assert app_of(deployment).wait() == 0


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_at_once(deployment: Serving, first: str, second: str) -> None:
    client = deployment.client()
    with client.stream("POST", "/models/llama2/generate_stream", json=long_body()) as response:
        chunks = response.iter_raw()
        next(chunks)
        app_of(deployment).send(signal.Signals[first])
        eventually(lambda: client.get("/health/ready").status_code == 503)
        app_of(deployment).send(signal.Signals[second])
        assert app_of(deployment).wait(END_SECONDS) == 0
        with pytest.raises(httpx.RemoteProtocolError):
            b"".join(chunks)


def test_the_app_ends_at_once_while_it_waits_for_agents(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    deployment.app = Process(APP, "--config", deployment.config_path)
    deployment.app.wait_for("waiting for the agents")
    assert deployment.app.stop() == 0


def test_another_app_takes_over_the_agents(deployment: Serving) -> None:
    app_of(deployment).send(signal.SIGKILL)
    app_of(deployment).wait()
    deployment.start_app()
    assert ask(deployment.client(), "hi", max_new_tokens=4) == {"generated_text": answer("hi", 4)}


@pytest.mark.parametrize("script", [APP, "start.py"])
def test_version(script: str) -> None:
    process = Process(script, "--version")
    assert process.wait() == 0
    assert process.output == __version__


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("port:", "prot:", "server.prot: unknown key, did you mean port?"),
        ("path: config/standin", "path: config/nothing", "models[0].path: config/nothing: no exported model"),
        ("folder: ", "folder: /proc/none", "logging.folder: "),
        ("- llama2", "- 'llama 2'", "models[0].names: 'llama 2' cannot stand in a URL"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_line_and_exit_code_2(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    path = standin_deployment(tmp_path).config_path
    path.write_text(path.read_text().replace(old, new, 1))
    process = Process(APP, "--config", path)
    assert process.wait() == 2
    assert len(process.lines) == 1
    assert named in process.output


@pytest.mark.parametrize("script", [APP, "start.py"])
def test_a_busy_port_or_a_missing_file_is_one_line_and_exit_code_2(tmp_path: Path, script: str) -> None:
    deployment = standin_deployment(tmp_path)
    with socket.create_server(("127.0.0.1", deployment.port)):
        busy = Process(script, "--config", deployment.config_path)
        assert busy.wait() == 2
    assert busy.lines == [f"server: cannot listen on 127.0.0.1:{deployment.port}: Address already in use"]
    missing = Process(script, "--config", tmp_path / "nothing.yaml")
    assert missing.wait() == 2
    assert missing.lines == [f"{tmp_path / 'nothing.yaml'}: cannot be read: No such file or directory"]


def test_the_port_can_be_given_on_the_command_line(deployment: Serving) -> None:
    app_of(deployment).stop()
    [deployment.port] = free_ports(1)
    deployment.app = Process(APP, "--config", deployment.config_path, "--port", str(deployment.port))
    deployment.app.wait_for("mindspore serving is started.")
    assert deployment.client().get("/health").status_code == 200


def test_agents_of_another_export_end_the_app_with_a_reason(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in (ROOT / "config/standin").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((other / "manifest.json").read_bytes())
    deployment = standin_deployment(tmp_path)
    try:
        deployment.start_agents()
        (other / "manifest.json").write_text(json.dumps({**manifest, "context_length": 64}))
        deployment.config_path.write_text(deployment.config_path.read_text().replace("config/standin", str(other)))
        app = deployment.app = Process(APP, "--config", deployment.config_path)
        assert app.wait() == 1
        assert "runs another export" in app.output
        assert "Traceback" not in app.output
    finally:
        deployment.stop()


def test_start_runs_agents_and_app_and_ends_both(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    process = deployment.app = Process("start.py", "--config", deployment.config_path)
    try:
        process.wait_for("try: curl")
        [command] = [line.removeprefix("try: ") for line in process.lines if line.startswith("try: ")]
        [url] = re.findall(r"http://\S+", command)
        [body] = re.findall(r"-d '(.*)'", command)
        response = httpx.post(url, json=json.loads(body), trust_env=False)
        expected = answer(json.loads(body)["inputs"], 40).encode()[:40].decode(errors="replace")  # tokens are bytes
        assert events(response.content)[-1]["data"] == expected
        children = process.children()
        assert len(children) >= 2  # start_agent.py and its agent
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        assert psutil.wait_procs(children, timeout=END_SECONDS)[1] == []
    finally:
        deployment.stop()


@pytest.mark.slow
def test_nothing_is_left_when_start_is_killed(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    process = deployment.app = Process("start.py", "--config", deployment.config_path)
    try:
        process.wait_for("try: curl")
        children = process.children()
        process.send(signal.SIGKILL)
        process.wait()
        assert psutil.wait_procs(children, timeout=END_SECONDS)[1] == []
    finally:
        deployment.stop()


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_is_left_after_two_signals_to_start(tmp_path: Path, stopped: bool) -> None:
    """In the middle of an answer, and with an agent that does not react."""
    deployment = standin_deployment(tmp_path, [SLOW], server={"drain_seconds": 60.0})
    process = deployment.app = Process("start.py", "--config", deployment.config_path)
    try:
        process.wait_for("try: curl")
        children = process.children()
        with deployment.client().stream("POST", "/models/llama2/generate_stream", json=long_body()) as response:
            chunks = response.iter_raw()
            next(chunks)
            [agent] = (child for child in children if child.cmdline()[-2:] == ["-m", "agent"])
            if stopped:
                agent.suspend()
            process.send(signal.SIGTERM)
            eventually(lambda: deployment.client().get("/health/ready").status_code == 503)
            process.send(signal.SIGTERM)
            assert process.wait() == 0
        assert psutil.wait_procs(children, timeout=END_SECONDS)[1] == []
        for port in (deployment.port, *load(deployment.config_path).models[0].agent_ports):
            with socket.create_server(("127.0.0.1", port)):
                pass  # it is free again
    finally:
        deployment.stop()


def test_start_ends_when_its_agents_do(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    process = deployment.app = Process("start.py", "--config", deployment.config_path)
    try:
        process.wait_for("try: curl")
        agents = next(child for child in process.children() if "start_agent.py" in " ".join(child.cmdline()))
        agents.kill()
        assert process.wait() == 1
        process.wait_for("the agents have ended with exit code -9")
    finally:
        deployment.stop()


def test_start_ends_when_an_agent_cannot_start(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path, [{"cache_memory": "16B"}])
    process = deployment.app = Process("start.py", "--config", deployment.config_path)
    try:
        assert process.wait() == 2
        assert "cache_memory" in process.output
        assert "Traceback" not in process.output
    finally:
        deployment.stop()
