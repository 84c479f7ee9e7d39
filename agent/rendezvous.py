"""Where the ranks of one group find each other: MindSpore's scheduler process, as the launcher sees it.

The ranks talk to it while they join (``agent.collective``), and to each other from then on. It has to live on all the
same, as MindSpore has no way to leave it in order, so its loss is taken like that of a rank.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from agent.child_process import ChildProcess, spawn
from config.free_ports import free_ports

HOST = "127.0.0.1"  # ranks on several hosts are not a thing that the launcher can start
JOIN_SECONDS = 600  # for all ranks to be there; each checks its files first, and one that ends is noticed at once
# The launcher, which is faster, and the deadline of a step watch over all of them; MindSpore is not to do it once more:
# not when it hears nothing of a rank or the scheduler, nor where a rank waits for another. (With its heartbeats off
# altogether, MS_DISABLE_HEARTBEAT, version 2.10 was once seen to crash while a rank joined.)
PATIENT = ("MS_NODE_TIMEOUT", "MS_HEARTBEAT_RETRY_TIMEOUT", "MS_CPU_COMM_OP_TIMEOUT")
PATIENCE_SECONDS = 3600
# For links of HCCL, which may be made no earlier than a first graph runs: ranks load and compile before, some of them
# slower than others, and its own 120 s are short
HCCL_TIMEOUT = "HCCL_CONNECT_TIMEOUT"


class Rendezvous(ChildProcess):
    """A started scheduler process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, shared: dict[str, str], log: Path) -> None:
        super().__init__(name, process)
        self._shared = shared
        self.log = log

    @classmethod
    async def start(cls, group: str, world_size: int, log: Path) -> Rendezvous:
        """Start the process; ``group`` is what messages call the ranks, ``log`` takes all that it writes.

        Raises:
            StartError: the system does not give us another process.
        """
        name = f"the rendezvous of {group}"
        [port] = free_ports(1)  # whoever takes it before MindSpore does ends this process, and the next one has another
        shared = shared_environment(world_size, port)
        own = {**shared, "MS_ROLE": "MS_SCHED", "GLOG_v": "3"}  # errors: its warnings come every 5 s
        return cls(name, await spawn(name, "agent.collective", log, own), shared, log)

    def environment(self, rank: int) -> dict[str, str]:
        """What a rank's process must have in its environment to join."""
        return {**self._shared, "MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank)}


def shared_environment(world_size: int, port: int) -> dict[str, str]:
    """What scheduler and ranks must agree on."""
    return {
        "MS_WORKER_NUM": str(world_size),
        "MS_SCHED_HOST": HOST,
        "MS_SCHED_PORT": str(port),
        "MS_TOPO_TIMEOUT": str(JOIN_SECONDS),
        "MS_RETRY_INTERVAL_LOWER": "1",  # seconds between two attempts to reach it, 3 to 5 otherwise
        "MS_RETRY_INTERVAL_UPPER": "1",
        HCCL_TIMEOUT: os.environ.get(HCCL_TIMEOUT, str(JOIN_SECONDS)),
        **dict.fromkeys(PATIENT, str(PATIENCE_SECONDS)),
    }
