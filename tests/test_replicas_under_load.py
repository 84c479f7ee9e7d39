"""Two groups of real agents, each with a launcher of its own, behind one app: one of them is lost under load."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from legacy_client import ask
from serving_processes import Serving, eventually, standin_deployment

from agent.arithmetic_model import answer
from config.free_ports import free_ports

pytestmark = pytest.mark.slow

SEATS = 4
TOKENS = 100  # of each answer: two seconds
PROMPTS = [f"prompt {number}" for number in range(2 * SEATS + 6)]


@dataclass
class TwoGroups:
    """The app, and the launcher of each group."""

    app: Serving
    groups: list[Serving]

    def model(self, client: httpx.Client) -> dict[str, Any]:
        """The status of the only model."""
        [model] = client.get("/serving/status").json()["models"]
        found: dict[str, Any] = model
        return found

    def kill(self, group: int) -> None:
        """End its agent in the middle of whatever it does; its launcher starts another."""
        agents = self.groups[group].agents
        assert agents
        [agent] = agents.children()
        agent.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoGroups]:
    folder = tmp_path_factory.mktemp("two")
    secret = folder / "secret"
    secret.write_bytes(b"a secret of thirty-two bytes ...")
    secret.chmod(0o600)
    shared = {"step_seconds": 0.02, "secret_file": str(secret)}
    sections = {"limits": {"max_num_seqs": SEATS}, "logging": {"folder": str(folder / "logs")}}
    ports = free_ports(2)
    app = standin_deployment(folder, [{**shared, "agent_ports": ports, "data_parallel": 2}], **sections)
    groups = []
    for port in ports:
        (folder / str(port)).mkdir()
        groups.append(standin_deployment(folder / str(port), [{**shared, "agent_ports": [port]}], **sections))
    try:
        for group in groups:
            group.start_agents()
        app.start_app()
        client = app.client()
        eventually(lambda: all(group["ready"] for group in TwoGroups(app, groups).model(client)["groups"]))
        yield TwoGroups(app, groups)
    finally:
        app.stop()
        for group in groups:
            group.stop()
    assert "Traceback" not in app.log, app.log


def by_hand(prompt: str) -> dict[str, str]:
    """The stand-in's answer, with the begin of a character as U+FFFD."""
    return {"generated_text": answer(prompt, TOKENS).encode()[:TOKENS].decode(errors="replace")}


@pytest.mark.parametrize("group", [0, 1])
def test_a_group_that_dies_under_load_costs_no_answer(two: TwoGroups, group: int) -> None:
    client = two.app.client()

    def get(prompt: str) -> dict[str, Any]:
        return ask(client, prompt, max_new_tokens=TOKENS, return_full_text=False)

    def running() -> list[int]:
        return [one["running"] for one in two.model(client)["groups"]]

    with ThreadPoolExecutor(len(PROMPTS) + 4) as threads:
        answers = [threads.submit(get, prompt) for prompt in PROMPTS]
        eventually(lambda: running() == [SEATS, SEATS])
        two.kill(group)
        eventually(lambda: not two.model(client)["groups"][group]["ready"])
        assert client.get("/health/ready").status_code == 200
        assert two.model(client)["ready"]
        late = [threads.submit(get, prompt) for prompt in PROMPTS[:4]]
        assert [one.result() for one in answers] == [by_hand(prompt) for prompt in PROMPTS]
        assert [one.result() for one in late] == [by_hand(prompt) for prompt in PROMPTS[:4]]
    eventually(lambda: all(one["ready"] for one in two.model(client)["groups"]))
    model = two.model(client)
    assert (model["running"], model["waiting"], model["cache_usage"]) == (0, 0, 0.0)
    assert model["max_running"] == 2 * SEATS
    lost = re.findall(r'agent_connections_lost_total\{engine="(\d)",model_name="llama2"\} (\S+)', metrics(client))
    assert dict(lost)[str(group)] == "1.0"
    assert float(re.findall(r"requests_moved_total\{.*\} (\S+)", metrics(client))[0]) > 0


def metrics(client: httpx.Client) -> str:
    return client.get("/metrics").text
