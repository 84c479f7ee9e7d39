"""start_agent.py as a user meets it: what it refuses, what it prints, whom it restarts, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from agent_client import AgentClient, attached
from serving_processes import ROOT, Process, standin_deployment
from step_plans import Sequenced, make_plan

from agent.arithmetic_model import BEGIN, write_model
from config.agents_state import read_state
from config.free_ports import free_ports
from config.manifest import read_manifest, write_manifest
from config.secret_file import create_secret, read_secret
from config.version import __version__

SECONDS = 30.0
READY = re.compile(r"agent 127\.0\.0\.1:(\d+) is ready: rank (\d+) of standin, pid (\d+), ([\d,]+) blocks of 16 tokens")


class Agents:
    """A running start_agent.py on the stand-in, in a folder of its own."""

    def __init__(self, folder: Path, models: list[dict[str, Any]]) -> None:
        self.logs = folder / "logs"
        self.process: Process = standin_deployment(folder, models).start_agents()

    def ready(self) -> list[tuple[int, int, int]]:
        """Port, rank and pid of each line that said ready, in the order in which they came."""
        found = [READY.fullmatch(line) for line in self.process.lines]
        return [(int(match[1]), int(match[2]), int(match[3])) for match in found if match]

    def wait_for_ready(self, count: int) -> list[tuple[int, int, int]]:
        """Wait for as many such lines."""
        eventually(lambda: len(self.ready()) >= count)
        return self.ready()

    def secret_file(self, port: int) -> Path:
        return self.logs / f"agents-{port}.secret"

    def state_file(self, port: int) -> Path:
        return self.logs / f"agents-{port}.state"

    def phase(self, port: int) -> str:
        state = read_state(self.state_file(port))
        return state.phase if state else "unknown"

    def answers(self, port: int, secret_port: int) -> bool:
        """Whether the agent at ``port`` runs a step."""
        with attached(port, self.secret_file(secret_port)) as client:
            request = Sequenced(0, [BEGIN, *b"hi"], [1])
            return client.tokens(make_plan([request.row()], resets=[request.reset()])) == [ord("d")]


@contextlib.contextmanager
def agents(folder: Path, *models: dict[str, Any]) -> Iterator[Agents]:
    """Start the agents; afterwards nothing of them may be there."""
    started = Agents(folder, list(models) or [{}])
    family = [psutil.Process(started.process.pid), *started.process.children()]
    try:
        yield started
    finally:
        started.process.stop()
        gone(*family)


def gone(*processes: psutil.Process) -> None:
    """All of them end (those of a pid that is reused are not meant)."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert not alive


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that nothing announces to us."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_free(port: int) -> bool:
    """Whether nobody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def refusal(config: Path) -> str:
    """The one line that start_agent.py writes when it starts nothing."""
    result = subprocess.run(
        [sys.executable, "start_agent.py", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("start_agent.py: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_version() -> None:
    result = subprocess.run([sys.executable, "start_agent.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_start_and_stop(tmp_path: Path, number: signal.Signals) -> None:
    ports = sorted(free_ports(3))
    with agents(tmp_path, {"agent_ports": ports[:2], "cache_memory": "64KiB"}, {"agent_ports": ports[2:]}) as started:
        lines = started.process.lines
        assert lines[-1] == "all agents started"
        assert {(port, rank) for port, rank, _ in started.ready()} == {(ports[0], 0), (ports[1], 1), (ports[2], 0)}
        assert any(line.endswith("512 blocks of 16 tokens") for line in lines)
        assert {pid for _, _, pid in started.ready()} == {child.pid for child in started.process.children()}
        for port in (ports[0], ports[2]):
            secret = started.secret_file(port)
            assert len(secret.read_bytes()) == 32
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert started.answers(ports[1], secret_port=ports[0])
        children = started.process.children()
        started.process.send(number)
        assert started.process.wait() == 0
        gone(*children)
        assert all(map(is_free, ports))
        assert list(started.logs.glob("*.secret*")) == []
    log = (started.logs / "start_agent.log").read_text()
    assert log.count("exited with code 0") == 3
    for port in ports:
        assert f"listening on 127.0.0.1:{port}" in (started.logs / f"agent-{port}.log").read_text()
        assert (started.logs / f"agent-{port}.stderr").read_text() == ""


def test_agents_keep_to_their_model(tmp_path: Path) -> None:
    """Models have secrets of their own; an agent's limits are those of the configuration."""
    ports = free_ports(2)
    with agents(tmp_path, {"agent_ports": ports[:1]}, {"agent_ports": ports[1:]}) as started:
        assert started.secret_file(ports[0]).read_bytes() != started.secret_file(ports[1]).read_bytes()
        with AgentClient(ports[0], started.secret_file(ports[1]).read_bytes()) as client, pytest.raises(EOFError):
            client.attach()
        with AgentClient(ports[1], started.secret_file(ports[1]).read_bytes()) as client:
            assert client.attach().max_num_seqs == 64


def refused_deployment(folder: Path, **model: Any) -> str:
    deployment = standin_deployment(folder, [model])
    message = refusal(deployment.config_path)
    assert not list(folder.rglob("*.secret*"))
    assert not list(folder.rglob("*.stderr"))  # no agent was started
    return message


def exported(folder: Path, **changes: Any) -> str:
    """A folder with a manifest like that of an exported model."""
    write_model(folder)
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), **changes))
    return str(folder)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "nowhere.yaml: cannot be read" in refusal(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"paht": "x"}, r"models\[0\]\.paht: unknown key, did you mean path"),
        ({"path": "config/nothing"}, r"models\[0\]\.path: .*config/nothing: no exported model here"),
        ({"target": "cpu"}, r"models\[0\]\.target: config/standin is exported for standin, not for cpu"),
        ({"cache_memory": "255B"}, r"models\[0\]\.cache_memory: 255B holds fewer than 3 blocks of 128 bytes"),
        ({"agent_host": "192.0.2.1"}, r"models\[0\]\.agent_host: 192\.0\.2\.1 is not loopback"),
        ({"secret_file": "/nowhere/secret"}, r"models\[0\]\.secret_file: /nowhere/secret: cannot be read"),
        ({"agent_ports": [7, 7]}, r"models\[0\]\.agent_ports: port 7"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path: Path, model: dict[str, Any], problem: str) -> None:
    assert re.search(problem, refused_deployment(tmp_path, **model))


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "model", target="cpu")
    message = refused_deployment(tmp_path, path=path, target="cpu", agent_ports=free_ports(2))
    assert re.search(r"models\[0\]\.agent_ports: .* is exported for 1 rank", message)


def test_other_weights_than_the_exported_ones_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "model", target="cpu", weights="gguf")
    message = refused_deployment(tmp_path, path=path, target="cpu", weights="int8")
    assert re.search(r"models\[0\]\.weights: .* has gguf; export it with --weights int8", message)


def test_a_busy_port_is_refused_and_its_owner_is_not_disturbed(tmp_path: Path) -> None:
    with agents(tmp_path, {}) as started:
        port = started.ready()[0][0]
        secret = started.secret_file(port).read_bytes()
        second = refusal(tmp_path / "deployment.yaml")
        assert f"models[0].agent_ports: cannot listen on 127.0.0.1:{port}: Address already in use" in second
        assert started.secret_file(port).read_bytes() == secret
        assert started.answers(port, secret_port=port)


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"s" * 32, 0o640, "other users can read it"),
        (b"s" * 31, 0o600, "holds 31 bytes"),
        (b"s" * 65, 0o600, "holds 65 bytes"),
    ],
)
def test_a_secret_file_that_keeps_no_secret_is_refused(tmp_path: Path, content: bytes, mode: int, problem: str) -> None:
    secret = tmp_path / "our"
    secret.write_bytes(content)
    secret.chmod(mode)
    message = refused_deployment(tmp_path, secret_file=str(secret))
    assert f"models[0].secret_file: {secret}" in message
    assert problem in message


def test_a_log_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    deployment = standin_deployment(tmp_path, logging={"folder": str(tmp_path / "file" / "logs")})
    assert "logging.folder" in refusal(deployment.config_path)


def test_an_agent_that_cannot_start_ends_the_others(tmp_path: Path) -> None:
    """What only the agent itself finds out: the reason is on the console, and the exit code is 1."""
    path = exported(tmp_path / "model", files={"tokenizer.json": "0" * 64})
    deployment = standin_deployment(tmp_path, [{}, {"path": path}])
    process = Process("start_agent.py", "--config", deployment.config_path)
    assert process.wait() == 1
    assert "exited with code 1, cannot start: ManifestError: " in process.output
    assert "tokenizer.json: is not the file that was exported" in process.output
    assert "all agents started" not in process.output
    assert list(tmp_path.rglob("*.secret*")) == []


def test_an_agent_that_is_killed_while_it_starts(tmp_path: Path) -> None:
    """One that cannot say why is named with its signal and the file that may tell more."""
    process = Process("start_agent.py", "--config", standin_deployment(tmp_path).config_path)
    eventually(lambda: bool(process.children()))
    process.children()[0].kill()
    assert process.wait() == 1
    assert re.search(r"was ended by SIGKILL, cannot start: see .*agent-\d+\.stderr", process.output)


def test_a_given_secret_file_is_used_and_kept(tmp_path: Path) -> None:
    secret = tmp_path / "our.secret"
    create_secret(secret)
    with agents(tmp_path, {"secret_file": str(secret)}) as started, attached(started.ready()[0][0], secret):
        assert not list(started.logs.glob("*.secret"))
    assert len(read_secret(secret)) == 32


def test_all_ranks_of_a_dead_agent_are_started_again_and_no_others(tmp_path: Path) -> None:
    ports = free_ports(3)
    with agents(tmp_path, {"agent_ports": ports[:2]}, {"agent_ports": ports[2:]}) as started:
        before = {port: pid for port, _, pid in started.ready()}
        os.kill(before[ports[1]], signal.SIGKILL)
        after = {port: pid for port, _, pid in started.wait_for_ready(5)}
        assert after[ports[0]] != before[ports[0]]
        assert after[ports[1]] != before[ports[1]]
        assert after[ports[2]] == before[ports[2]]
        assert started.answers(ports[0], ports[0])
        assert started.answers(ports[1], ports[0])
        assert "was ended by SIGKILL; starting llama2, internlm again" in started.process.output


def test_a_group_is_started_again_alone(tmp_path: Path) -> None:
    """Each group of a model has a state of its own; they share the secret."""
    ports = free_ports(4)
    with agents(tmp_path, {"agent_ports": ports, "data_parallel": 2}) as started:
        assert {(port, rank) for port, rank, _ in started.ready()} == {(port, i % 2) for i, port in enumerate(ports)}
        assert [read_state(started.state_file(port)) is None for port in ports] == [False, True, False, True]
        before = {port: pid for port, _, pid in started.ready()}
        os.kill(before[ports[3]], signal.SIGKILL)
        after = {port: pid for port, _, pid in started.wait_for_ready(6)}
        assert [after[port] == before[port] for port in ports] == [True, True, False, False]
        assert "was ended by SIGKILL; starting group 1 of llama2, internlm again" in started.process.output
        eventually(lambda: started.phase(ports[2]) == "ready")
        states = [read_state(started.state_file(port)) for port in (ports[0], ports[2])]
        assert [state.restarts for state in states if state] == [0, 1]
        assert all(started.answers(port, secret_port=ports[0]) for port in ports)
    assert list(started.logs.glob("*.state")) == []


@pytest.mark.slow
def test_a_model_that_cannot_be_kept_running_is_given_up(tmp_path: Path) -> None:
    path = exported(tmp_path / "model")
    with agents(tmp_path, {"path": path}) as started:
        shutil.rmtree(path)
        os.kill(started.ready()[0][2], signal.SIGKILL)
        assert started.process.wait() == 1
        assert "no exported model here" in started.process.output
        assert "giving up llama2, internlm after 5 restarts in a row" in started.process.output
        assert "no model is left to serve" in started.process.output


def test_a_start_has_its_time(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path, limits={"start_seconds": 0.01})
    launcher = Process("start_agent.py", "--config", deployment.config_path)
    assert launcher.wait() == 1
    assert "llama2, internlm are not ready after 0.01 s (limits.start_seconds)" in launcher.output


@pytest.mark.slow
def test_the_others_are_served_on_when_a_model_is_given_up(tmp_path: Path) -> None:
    path, [broken, other] = exported(tmp_path / "model"), free_ports(2)
    with agents(tmp_path, {"path": path, "agent_ports": [broken]}, {"agent_ports": [other]}) as started:
        pids = {port: pid for port, _, pid in started.ready()}
        shutil.rmtree(path)
        os.kill(pids[broken], signal.SIGKILL)
        started.process.wait_for("giving up llama2")
        assert started.answers(other, other)
        assert started.process.stop() == 0


@pytest.mark.slow
def test_a_launcher_that_waits_before_a_restart_ends_at_once(tmp_path: Path) -> None:
    path = exported(tmp_path / "model")
    with agents(tmp_path, {"path": path}) as started:
        shutil.rmtree(path)
        os.kill(started.ready()[0][2], signal.SIGKILL)
        started.process.wait_for("starting llama2, internlm again in 4 s")
        started.process.send(signal.SIGTERM)
        assert started.process.wait(seconds=3.5) == 0
    assert list(started.logs.glob("*.secret*")) == list(started.logs.glob("*.state*")) == []


@pytest.mark.parametrize("step_seconds", [0.0, 0.5])
def test_agents_end_when_the_launcher_is_killed(tmp_path: Path, step_seconds: float) -> None:
    """Also those that are working on a step."""
    ports = free_ports(2)
    with agents(tmp_path, {"agent_ports": ports, "step_seconds": step_seconds}) as started:
        children = started.process.children()
        with attached(ports[0], started.secret_file(ports[0])) as client:
            request = Sequenced(0, [BEGIN, *b"hi"], [1])
            client.send(make_plan([request.row()], resets=[request.reset()]))
            started.process.send(signal.SIGKILL)
            assert started.process.wait() == -signal.SIGKILL
            gone(*children)
        assert all(map(is_free, ports))


def test_an_agent_that_starts_while_the_launcher_is_killed_ends(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    process = Process("start_agent.py", "--config", deployment.config_path)
    eventually(lambda: bool(process.children()))
    children = process.children()
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    gone(*children)


def test_a_second_signal_ends_an_agent_that_does_not_stop(tmp_path: Path) -> None:
    with agents(tmp_path, {}) as started:
        [child] = started.process.children()
        child.suspend()
        started.process.send(signal.SIGTERM)
        eventually(lambda: "stopping" in (started.logs / "start_agent.log").read_text())
        started.process.send(signal.SIGTERM)
        assert started.process.wait(seconds=8) == 0
        gone(child)
