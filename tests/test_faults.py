"""Faults under load, through real processes: nothing is lost, no text changes, no block leaks; readiness tells."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_deployment import SLOW, Faulty
from serving_processes import eventually, serving

from agent.arithmetic_model import write_model
from config.free_ports import free_ports

STREAMS = 8


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
    [
        *(kill, cut, corrupt),
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in (stall, stop, kill_launcher, crash)),
    ],
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
    assert faulty.gauge("agent_restarts_total") >= 1
    assert "was ended by SIGKILL after no sign of life for 5 s; starting llama2, internlm again" in faulty.agents.output


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


@pytest.mark.parametrize(
    "fault", ["raise", pytest.param("crash", marks=pytest.mark.slow), pytest.param("hang", marks=pytest.mark.slow)]
)
def test_the_culprit_alone_gets_an_error(tmp_path: Path, undisturbed: list[str], fault: str) -> None:
    """One prompt among many is too much for the model, whatever it is in a step with."""
    limits = {"step_seconds": 1.5, "step_seconds_per_token": 0.0}
    faulty = Faulty(tmp_path, model={**SLOW, "standin_faults": {"☠": fault}}, limits=limits)
    try:
        before = faulty.agent().pid
        with ThreadPoolExecutor(STREAMS + 2) as threads:
            answers = [threads.submit(faulty.ask, number) for number in range(STREAMS)]
            eventually(lambda: faulty.gauge("num_requests_running") == STREAMS)
            culprit = threads.submit(faulty.ask_for, "poison ☠", 20, streamed=True)
            with pytest.raises(AssertionError, match="this request"):
                culprit.result()
            assert [answer.result() for answer in answers] == undisturbed
        eventually(lambda: faulty.client.get("/health/ready").status_code == 200)
        eventually(lambda: faulty.gauge("kv_cache_usage_perc") == 0)
        assert faulty.gauge("agent_restarts_total") == (0 if fault == "raise" else 3)
        assert faulty.agents.output.count("exited with code 3") == (3 if fault == "hang" else 0)
        assert (faulty.agent().pid == before) == (fault == "raise")
    finally:
        faulty.stop()


@pytest.mark.slow
def test_who_was_stopped_does_not_take_that_for_the_silence_of_others(faulty: Faulty, undisturbed: list[str]) -> None:
    agent, lost = faulty.agent().pid, faulty.gauge("connections_lost_total")
    assert faulty.serving.app is not None
    for process, seconds in ((faulty.agents, 8.0), (faulty.serving.app, 4.0)):
        process.send(signal.SIGSTOP)
        time.sleep(seconds)  # longer than it would wait for a sign of life
        process.send(signal.SIGCONT)
        assert faulty.ask(1) == undisturbed[1]
    assert (faulty.agent().pid, faulty.gauge("connections_lost_total")) == (agent, lost)


@pytest.mark.slow
def test_requests_end_when_the_agents_are_given_up(tmp_path: Path) -> None:
    """Not before: they wait through all attempts to start the agents again."""
    model = tmp_path / "model"
    write_model(model)
    faulty = Faulty(tmp_path, model={**SLOW, "path": str(model)})
    try:
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(faulty.ask, number) for number in range(2)]
            eventually(lambda: faulty.gauge("num_requests_running") == 2)
            (model / "manifest.json").unlink()
            faulty.agent().kill()
            for answer in answers:
                assert isinstance(answer.exception(), AssertionError)  # of an error event, or of status 500
        assert faulty.agents.wait() == 1
        assert "restart 5 of 5" in faulty.serving.log
        assert "given up after 5 restarts in a row" in faulty.serving.log
        unready = faulty.client.get("/health/ready")
        assert (unready.status_code, "given up after 5 restarts in a row)" in unready.text) == (503, True)
        assert faulty.client.post("/models/llama2", json={"inputs": "hi"}).status_code == 503
        assert faulty.gauge("kv_cache_usage_perc") == 0
    finally:
        faulty.stop()


@pytest.mark.slow
def test_a_request_on_which_ranks_differ_ends_with_an_error_and_no_other(tmp_path: Path) -> None:
    model = {"agent_ports": free_ports(2), "standin_faults": {"☠": "differ"}}
    with serving(tmp_path, [model]) as deployment:
        with ThreadPoolExecutor(2) as threads:
            culprit, other = threads.map(
                lambda inputs: deployment.client().post("/models/llama2/generate", json={"inputs": inputs}),
                ("poison ☠", "hi"),
            )
        assert (culprit.status_code, "this request" in culprit.text) == (500, True)
        assert other.json()["generated_text"].startswith("dgvsykж好")
        assert "differs from rank 0 in step" in deployment.log
        assert deployment.agents is not None
        assert "again" not in deployment.agents.output  # nothing had to be started
