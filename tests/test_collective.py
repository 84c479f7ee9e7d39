"""Ranks that compute together: a real rendezvous, real ranks, and a graph with collectives that each of them loads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
import psutil
import pytest
from mindspore import Tensor, nn, ops
from serving_processes import ROOT

from agent import rendezvous
from agent.rendezvous import Rendezvous, shared_environment
from config.free_ports import free_ports

pytestmark = pytest.mark.slow  # test_tiny_ranks.py has ranks that meet, among the others

RANKS = 2
SECONDS = 120.0  # a busy machine takes half a minute to import MindSpore
GROUP = "mccl_world_group"  # an export needs no group, only its name


class Together(nn.Cell):
    """What ranks do together: the sum of all inputs, and all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.gather = ops.AllReduce(group=GROUP), ops.AllGather(group=GROUP)
        self.gather.add_prim_attr("rank_size", RANKS)  # of this process otherwise, which is no rank

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.sum(x), self.gather(x)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph as a file."""
    file = tmp_path_factory.mktemp("graph") / "together.mindir"
    ms.export(Together(), Tensor(np.zeros((1, 2), np.float32)), file_name=str(file), file_format="MINDIR")
    return file


@contextlib.asynccontextmanager
async def rank(environment: Mapping[str, str], graph: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A rank that joins, runs the graph and stays."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "tests" / "collective_rank.py"), str(graph)),
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def said(process: asyncio.subprocess.Process, text: str) -> str:
    """The next line of a rank's output that holds ``text``."""
    assert process.stdout
    seen = []
    async for line in process.stdout:
        seen.append(line.decode())
        if text in seen[-1]:
            return seen[-1].strip()
    raise AssertionError(f"ended without {text!r}:\n{''.join(seen)}")


def test_ranks_meet_and_compute_together(graph: Path, tmp_path: Path) -> None:
    async def main() -> None:
        meeting = await Rendezvous.start("the test", RANKS, tmp_path / "log")
        try:
            async with rank(meeting.environment(0), graph) as one, rank(meeting.environment(1), graph) as other:
                results = await asyncio.gather(said(one, "[["), said(other, "[["))
                assert results == ["[[3.0, 3.0]] [[1.0, 1.0], [2.0, 2.0]]"] * RANKS
                mine = {one.pid, other.pid, *(child.pid for child in psutil.Process().children())}
                listening = [c for c in psutil.net_connections("tcp") if c.pid in mine and c.status == "LISTEN"]
                assert listening
                assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
        finally:
            meeting.kill()
            assert "the rendezvous of the test was ended by SIGKILL" in await meeting.ended()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_hccl_waits_as_long_as_ranks_may_take_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    assert shared_environment(RANKS, 1)["HCCL_CONNECT_TIMEOUT"] == str(rendezvous.JOIN_SECONDS)
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1200")
    assert shared_environment(RANKS, 1)["HCCL_CONNECT_TIMEOUT"] == "1200"


def test_a_rank_that_waits_for_the_others_too_long_says_so(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 5)

    async def main() -> None:
        meeting = await Rendezvous.start("the test", RANKS, tmp_path / "log")
        async with rank(meeting.environment(1), graph) as lonely:
            line = await said(lonely, "CollectiveError: ")
            assert "rank 1 of 2 did not meet the others at 127.0.0.1:" in line
            assert "within 5 s" in line
            assert "stderr" in line
        meeting.kill()
        await meeting.ended()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


@pytest.mark.parametrize("member", ["rendezvous", "rank"])
def test_who_waits_for_ranks_ends_when_the_launcher_is_gone(graph: Path, tmp_path: Path, member: str) -> None:
    """Inside MindSpore, where no other thread runs; what it sees of a launcher is the pipe that closes."""
    (port,) = free_ports(1)
    role = {"MS_ROLE": "MS_SCHED"} if member == "rendezvous" else {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "0"}
    command = ["-m", "agent.collective"] if member == "rendezvous" else ["tests/collective_rank.py", str(graph)]
    log = tmp_path / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **shared_environment(RANKS, port), **role, "PYTHONPATH": str(ROOT), "GLOG_v": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            while "cluster/topology" not in log.read_text(errors="replace"):
                assert process.poll() is None, log.read_text()
            assert process.stdin
            process.stdin.close()
            assert process.wait(SECONDS) < 0
        finally:
            process.kill()
