"""Faults under load, through real processes: nothing is lost, no text changes, no block leaks, and readiness says so."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from legacy_client import event_text, events
from serving_processes import Process, Serving, eventually, free_ports, serving, standin_deployment

STREAMS = 8
TOKENS = 100  # of each answer: two seconds, so that all are under way when something happens
SLOW = {"step_seconds": 0.02}


class Proxy:
    """Stands between app and agent, and passes bytes on until it is told otherwise."""

    def __init__(self, target: int) -> None:
        self.stalled = threading.Event()
        self.corrupt = threading.Event()
        self._target = target
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break what is connected now."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                app, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(app,), daemon=True).start()

    def _pass_on(self, app: socket.socket) -> None:
        with contextlib.suppress(OSError), app, socket.create_connection(("127.0.0.1", self._target)) as agent:
            self._ends += [app, agent]
            while True:
                for end in select.select([app, agent], [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    if self.stalled.is_set():
                        continue  # lost on the way
                    if self.corrupt.is_set():
                        self.corrupt.clear()
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    (agent if end is app else app).sendall(data)


class Faulty:
    """A deployment whose app reaches its agent through a proxy."""

    def __init__(self, folder: Path) -> None:
        self.serving: Serving = standin_deployment(folder, [SLOW])
        content = yaml.safe_load(self.serving.config_path.read_text())
        [self.agent_port] = content["models"][0]["agent_ports"]
        self.agents: Process = self.serving.start_agents()
        self.proxy = Proxy(self.agent_port)
        content["models"][0]["agent_ports"] = [self.proxy.port]
        content["models"][0]["secret_file"] = str(folder / "logs" / f"agents-{self.agent_port}.secret")
        self._agents_config = self.serving.config_path
        self.serving.config_path = folder / "app.yaml"
        self.serving.config_path.write_text(yaml.safe_dump(content))
        self.serving.start_app()
        self.client = self.serving.client()

    def agent(self) -> psutil.Process:
        """The agent of now."""
        [agent] = self.agents.children()
        return agent

    def restart_launcher(self) -> None:
        """Kill the launcher, see its agent go, start another."""
        agent = self.agent()
        self.agents.send(signal.SIGKILL)
        self.agents.wait()
        assert psutil.wait_procs([agent], timeout=20)[1] == []
        self.agents = self.serving.agents = Process("start_agent.py", "--config", self._agents_config)
        self.agents.wait_for("all agents started")

    def ask(self, number: int) -> str:
        """One request's text; every other one is streamed."""
        parameters = {"ignore_eos": True, "max_new_tokens": TOKENS + number, "return_full_text": False}
        body = {"inputs": f"prompt {number}", "parameters": {**parameters, "return_protocol": "sse"}}
        if number % 2:
            response = self.client.post("/models/llama2/generate_stream", json=body)
            assert response.status_code == 200, response.text
            assert events(response.content)[-1]["event"] != "error", response.text
            return event_text(response.content)
        response = self.client.post("/models/llama2", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["generated_text"]
        return text

    def gauge(self, name: str) -> float:
        [value] = re.findall(rf"^\w*{name}(?:{{.*}})? (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(value)

    def stop(self) -> None:
        self.serving.stop()
        self.proxy.close()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    started = Faulty(tmp_path_factory.mktemp("faults"))
    try:
        yield started
    finally:
        started.stop()
    assert "Traceback" not in started.serving.log, started.serving.log


@pytest.fixture(scope="module")
def undisturbed(faulty: Faulty) -> list[str]:
    """The texts of the load when nothing happens."""
    with ThreadPoolExecutor(STREAMS) as threads:
        return list(threads.map(faulty.ask, range(STREAMS)))


def kill(faulty: Faulty) -> None:
    faulty.agent().kill()


def crash(faulty: Faulty) -> None:
    """As native code does it, inside a step as likely as not."""
    os.kill(faulty.agent().pid, signal.SIGSEGV)


def stop(faulty: Faulty) -> None:
    faulty.agent().suspend()


def cut(faulty: Faulty) -> None:
    faulty.proxy.cut()


def corrupt(faulty: Faulty) -> None:
    faulty.proxy.corrupt.set()


def stall(faulty: Faulty) -> None:
    """Bytes are lost without anybody being told, until the app has given the connection up."""
    faulty.proxy.stalled.set()
    eventually(lambda: faulty.client.get("/health/ready").status_code == 503)
    faulty.proxy.stalled.clear()
    faulty.proxy.cut()


def kill_launcher(faulty: Faulty) -> None:
    faulty.restart_launcher()


@pytest.mark.parametrize(
    "fault",
    [kill, cut, corrupt, stall, pytest.param(stop), pytest.param(crash, marks=pytest.mark.slow), kill_launcher],
)
def test_nothing_is_lost(faulty: Faulty, undisturbed: list[str], fault: Callable[[Faulty], None]) -> None:
    lost = faulty.gauge("connections_lost_total")
    with ThreadPoolExecutor(STREAMS + 1) as threads:
        answers = [threads.submit(faulty.ask, number) for number in range(STREAMS)]
        eventually(lambda: faulty.gauge("num_requests_running") == STREAMS)
        fault(faulty)
        eventually(lambda: faulty.gauge("connections_lost_total") > lost)
        late = threads.submit(faulty.ask, 0)  # new requests queue meanwhile
        assert [answer.result() for answer in answers] == undisturbed
        assert late.result() == undisturbed[0]
    assert faulty.client.get("/health/ready").status_code == 200
    eventually(lambda: faulty.gauge("kv_cache_usage_perc") == 0)


def test_readiness_while_the_agent_is_away(faulty: Faulty) -> None:
    before = faulty.agent().pid
    faulty.agent().suspend()
    eventually(lambda: faulty.client.get("/health/ready").status_code == 503)  # noticed though nothing runs
    eventually(lambda: faulty.client.get("/health/ready").status_code == 200)
    assert faulty.agent().pid != before
    assert "was ended by SIGKILL after no sign of life for 5 s; starting its model again" in faulty.agents.output


def test_the_next_app_finds_the_agents(faulty: Faulty, undisturbed: list[str]) -> None:
    agent = faulty.agent().pid
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(faulty.ask, 0)
        eventually(lambda: faulty.gauge("num_requests_running") == 1)
        app = faulty.serving.app
        assert app is not None
        app.send(signal.SIGKILL)
        app.wait()
        assert isinstance(lost.exception(), Exception)
    faulty.serving.start_app()
    assert faulty.ask(1) == undisturbed[1]
    assert faulty.agent().pid == agent


@pytest.mark.slow
def test_a_step_that_hangs_again_and_again_ends_in_an_error(tmp_path: Path) -> None:
    """The deadline of a step ends the agent, restarts follow, and when they are used up the requests end."""
    ports = free_ports(2)  # the second model keeps the launcher alive
    models = [{"step_seconds": 3.0, "agent_ports": ports[:1]}, {"agent_ports": ports[1:]}]
    with serving(tmp_path, models, limits={"step_seconds": 0.3, "step_seconds_per_token": 0.0}) as deployment:
        client = deployment.client(headers={"x-request-id": "hung"})
        response = client.post("/models/llama2", json={"inputs": "hi", "parameters": {"max_new_tokens": 4}})
        assert response.status_code == 500, response.text
        assert deployment.agents is not None
        assert "exited with code 3; giving up llama2" in deployment.agents.output
        assert "given up after 5 restarts in a row" in deployment.log
        other = client.post("/models/model1", json={"inputs": "hi", "parameters": {"max_new_tokens": 4}})
        assert other.status_code == 200
