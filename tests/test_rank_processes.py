"""Processes that say a line each: all are heard, or the first that is lost is named and the others are ended."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process

import pytest

from benchmarks import rank_processes
from benchmarks.rank_processes import RankLost

STAYS = "import sys; print({!r}, flush=True); sys.stdin.read()"
SILENT = "import sys; sys.stdin.read()"
DEAF = "import time; time.sleep(600)"


async def start(*codes: str) -> list[Process]:
    return [await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=PIPE, stdout=PIPE) for code in codes]


async def heard(*codes: str) -> tuple[list[bytes], list[int | None]]:
    """The lines, and how each process ended."""
    ranks = await start(*codes)
    try:
        said = await rank_processes.lines_of(ranks)
    finally:
        await rank_processes.end(ranks)
        assert all(rank.returncode is not None for rank in ranks)
    return said, [rank.returncode for rank in ranks]


def test_all_are_heard_and_end_when_their_input_closes() -> None:
    assert asyncio.run(heard(STAYS.format("a"), STAYS.format("b"))) == ([b"a\n", b"b\n"], [0, 0])


@pytest.mark.parametrize(
    ("last", "how"),
    [
        ("raise SystemExit(3)", "exited with code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("print('half a line', end='')", "exited with code 0"),
    ],
)
def test_the_first_that_is_lost_is_named_while_the_others_wait(last: str, how: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RankLost, match=f"rank 2 of 3 {how}"):
        asyncio.run(heard(STAYS.format("a"), SILENT, last))
    assert time.monotonic() - begin < 20


def test_one_that_does_not_listen_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_processes, "GRACE_SECONDS", 0.2)
    closes = "import os, time; os.close(1); time.sleep(600)"  # it has failed, and is slow to end
    with pytest.raises(RankLost, match="rank 1 of 2 has failed"):
        asyncio.run(heard(DEAF, closes))
