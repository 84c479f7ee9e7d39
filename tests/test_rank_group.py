"""A group of ranks whose rendezvous loses its port to somebody else starts on another one."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_processes import standin_deployment
from tiny_checkpoints import write_tiny

from agent import rank_group, rendezvous
from agent.child_process import StartError
from agent.rank_group import RankGroup
from config import free_ports
from config.secret_file import create_secret
from config.serving_config import ServingConfig, load
from models import export

pytestmark = pytest.mark.slow

SECONDS = 120.0  # a busy machine takes half a minute to import MindSpore
RANKS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServingConfig:
    """A deployment of a tiny model on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny("llama", folder / "checkpoint")
    options = export.ExportOptions(operators="portable", weights="float32", ranks=RANKS)
    export.export(folder / "checkpoint", folder / "model", options)
    ports = free_ports.free_ports(RANKS)
    model = {"path": str(folder / "model"), "target": "cpu", "agent_ports": ports, "cache_dtype": "float32"}
    config = load(standin_deployment(folder, [model]).config_path)
    Path(config.logging.folder).mkdir()
    create_secret(config.secret_path(config.models[0]))
    return config


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def started(config: ServingConfig) -> None:
    """Start the group, and stop it."""

    async def main() -> None:
        group = RankGroup(config, 0, 0)
        try:
            await group.start()
        finally:
            await group.stop()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_a_port_that_is_taken_in_between_is_not_the_end(
    config: ServingConfig, taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offered = iter([[taken]])
    monkeypatch.setattr(rendezvous, "free_ports", lambda count: next(offered, None) or free_ports.free_ports(count))
    with caplog.at_level(logging.INFO, logger="agent"):
        started(config)
    again = [line for line in caplog.messages if "trying again on another port" in line]
    assert len(again) == 1
    assert again[0].startswith("the rendezvous of llama2, internlm exited with code 1 before its ranks were ready")
    assert len([line for line in caplog.messages if " is ready: rank " in line]) == RANKS


def test_who_never_gets_a_port_gives_up(
    config: ServingConfig, taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "free_ports", lambda count: [taken])
    with pytest.raises(StartError, match=r"^the rendezvous of .* before its ranks were ready: see .*\.stderr$"):
        started(config)
    tried = [line for line in caplog.messages if "trying again on another port" in line]
    assert len(tried) == rank_group.TRIES - 1
