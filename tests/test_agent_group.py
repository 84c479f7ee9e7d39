"""Connections to real agents: waiting for them, agreeing with them, losing them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest
from serving_processes import Serving, standin_deployment
from step_plans import Sequenced
from step_plans import make_plan as step_of

from agent.arithmetic_model import BEGIN
from agent.protocol import StepPlan, pack_ints
from config.free_ports import free_ports
from config.manifest import Manifest, read_manifest
from config.serving_config import LimitsConfig, ServingConfig, load
from server.agent_group import AgentGroup, AgentsLost, AgentsRefused, StepFailed
from server.step_plan import make_probe

RANKS = 2


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two ranks of the stand-in; each computes the whole model, and they differ on a prompt with a ``~``."""
    folder = tmp_path_factory.mktemp("group")
    config = two_ranks(folder)
    config.start_agents()
    yield config
    config.stop()


def two_ranks(folder: Path) -> Serving:
    return standin_deployment(folder, [{"agent_ports": free_ports(RANKS), "standin_faults": {"~": "differ"}}])


def group(
    config: ServingConfig,
    ports: Sequence[int] | None = None,
    manifest: Manifest | None = None,
    secret_path: Path | None = None,
) -> AgentGroup:
    model = config.models[0]
    return AgentGroup(
        model.agent_host,
        ports or model.groups[0],
        manifest or read_manifest(model.path),
        config.limits,
        secret_path=secret_path or config.secret_path(model),
        state_path=config.state_path(model),
    )


def test_all_ranks_answer_a_plan(deployment: Serving) -> None:
    async def main() -> None:
        agents = group(load(deployment.config_path))
        assert not agents.connected
        hello = await agents.connect()
        assert (hello.rank, hello.world_size, hello.model) == (0, RANKS, "standin")
        assert agents.connected
        agents.send(make_probe())
        output = await agents.receive(make_probe())
        assert len(output.token_ids) == 4
        await agents.close()
        assert not agents.connected

    asyncio.run(main())


def test_a_plan_that_cannot_be_run_names_the_agent_and_leaves_it_serving(deployment: Serving) -> None:
    async def main() -> None:
        config = load(deployment.config_path)
        agents = group(config)
        await agents.connect()
        bad: StepPlan = msgspec.structs.replace(make_probe(), token_ids=pack_ints([-1]))
        agents.send(bad)
        with pytest.raises(StepFailed, match=f":{config.models[0].agent_ports[0]}.*token_ids"):
            await agents.receive(bad)
        agents.send(make_probe())
        await agents.receive(make_probe())
        await agents.close()

    asyncio.run(main())


def test_ranks_that_differ_are_lost_and_named(deployment: Serving) -> None:
    async def main() -> None:
        config = load(deployment.config_path)
        agents = group(config)
        await agents.connect()
        same, different = (Sequenced(0, [BEGIN, *prompt], [1]) for prompt in (b"a-b", b"a~b"))
        plan = step_of([same.row()], resets=[same.reset()])
        agents.send(plan)
        await agents.receive(plan)
        plan = step_of([different.row()], resets=[different.reset()], step_id=2)
        agents.send(plan)
        port = config.models[0].agent_ports[1]
        with pytest.raises(AgentsLost, match=rf"rank 1 \(the agent at .*:{port}\) differs from rank 0 in step 2"):
            await agents.receive(plan)
        assert not agents.connected
        await agents.connect()  # they serve on, and what they had in common is made anew
        await agents.close()

    asyncio.run(main())


def test_agents_of_another_model_are_refused(deployment: Serving) -> None:
    config = load(deployment.config_path)
    model = config.models[0]
    other = msgspec.structs.replace(read_manifest(model.path), context_length=77)

    async def main() -> None:
        for agents, reason in (
            (group(config, manifest=other), "another export of standin"),
            (group(config, model.agent_ports[::-1]), "is rank 1 of 2; the configuration makes it rank 0"),
            (group(config, model.agent_ports[:1]), "is rank 0 of 2; the configuration makes it rank 0 of 1"),
        ):
            with pytest.raises(AgentsRefused, match=reason):
                await agents.connect()
            assert not agents.connected
            await agents.close()

    asyncio.run(main())


async def probe_for_ever(agents: AgentGroup) -> None:
    while True:
        agents.send(make_probe())
        await agents.receive(make_probe())


def test_it_waits_and_says_for_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deployment = two_ranks(tmp_path)
    caplog.set_level(logging.INFO)

    async def main() -> None:
        config = load(deployment.config_path)
        secret = config.secret_path(config.models[0])
        agents = group(config)
        connecting = asyncio.create_task(agents.connect())
        await logged(caplog, "secret file")
        secret.parent.mkdir(exist_ok=True)
        secret.write_bytes(b"")
        secret.chmod(0o644)
        await logged(caplog, "other users can read it")
        secret.chmod(0o600)
        await logged(caplog, "holds 0 bytes")
        secret.write_bytes(b"x" * 32)
        await logged(caplog, str(config.models[0].agent_ports[0]))
        await asyncio.to_thread(deployment.start_agents)
        assert (await connecting).world_size == RANKS
        await agents.close()

    try:
        asyncio.run(main())
    finally:
        deployment.stop()
    waits = [record for record in caplog.messages if "waiting for the agents" in record]
    assert len(waits) <= 7, "a reason is logged once, not at every attempt"


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until something was logged."""
    for _ in range(3000):
        if text in caplog.text:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"not logged within 30 s: {text}")


def test_with_a_wrong_secret_nothing_is_said(
    deployment: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"not the secret of these agents..")
        secret.chmod(0o600)
        agents = group(load(deployment.config_path), secret_path=secret)
        connecting = asyncio.create_task(agents.connect())
        await logged(caplog, "has it the same secret file")
        connecting.cancel()
        await asyncio.wait([connecting])
        await agents.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        pytest.param(LimitsConfig(), "no sign of life for 2 s", id="silence"),
        pytest.param(LimitsConfig(step_seconds=0.1, step_seconds_per_token=0.0), "step 0 is overdue", id="deadline"),
    ],
)
def test_a_rank_that_does_not_answer_is_lost(
    deployment: Serving, limits: LimitsConfig, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.agent_group.PATIENCE_SECONDS", 0.0)

    async def main() -> None:
        agents = group(msgspec.structs.replace(load(deployment.config_path), limits=limits))
        stopped = psutil.Process((await agents.connect()).pid)
        stopped.suspend()
        try:
            agents.send(make_probe())
            with pytest.raises(AgentsLost, match=reason):
                await agents.receive(make_probe())
            assert not agents.alive
        finally:
            stopped.resume()
        await agents.connect()
        assert agents.alive
        await agents.close()

    asyncio.run(main())


def test_a_dead_rank_loses_the_group_and_a_new_one_is_found(deployment: Serving) -> None:
    async def main() -> None:
        agents = group(load(deployment.config_path))
        pid = (await agents.connect()).pid
        psutil.Process(pid).kill()
        with pytest.raises(AgentsLost):
            await probe_for_ever(agents)
        assert not agents.connected
        assert (await agents.connect()).pid != pid
        agents.send(make_probe())
        await agents.receive(make_probe())
        await agents.close()

    asyncio.run(main())
