"""The processes of one group: all ranks of a model, and the rendezvous of those that compute together."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from agent.agent_process import AgentProcess
from agent.child_process import StartError
from agent.lifeline import AgentSettings
from agent.rendezvous import Rendezvous
from agent.tasks import first, together
from config.serving_config import ModelConfig, ServingConfig

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL: a step in progress may finish
TRIES = 3  # to start ranks, each on another port for their rendezvous
FIRST_SECONDS = 30.0  # in which a rendezvous ends whose port somebody took; importing MindSpore is most of it
LAST_SECONDS = 2.0  # the same once one has ended: no step of the others can count any more

logger = logging.getLogger(__name__)


class PortLost(StartError):
    """A rendezvous ended at once, as it does where somebody else took its port before it did."""


class RankGroup:
    """A group, which starts, lives and ends as one: what befalls a rank befalls all."""

    def __init__(self, config: ServingConfig, model_index: int, group: int) -> None:
        model = config.models[model_index]
        names = ", ".join(model.names)
        self.name = f"group {group} of {names}" if model.data_parallel > 1 else names
        self.state_path = config.state_path(model, group)
        self._start_seconds = config.limits.start_seconds
        self._settings = [AgentSettings(config, model_index, group, rank) for rank in range(len(model.groups[group]))]
        self._ranks: list[AgentProcess] = []
        self._rendezvous: list[Rendezvous] = []  # one, or none where no rank computes with another

    async def start(self) -> None:
        """Start all ranks and wait until they are ready.

        Raises:
            StartError: one of them is not going to be.
        """
        for _ in range(TRIES - 1):
            try:
                await self._start()
            except PortLost as error:
                logger.warning("%s; trying again on another port", error)
                await self.stop()
            else:
                return
        await self._start()

    async def _start(self) -> None:
        """``start``, tried once.

        Raises:
            PortLost: the rendezvous did not come about.
            StartError: anything else.
        """
        self._ranks, self._rendezvous = [], []
        rank_0, world_size = self._settings[0], len(self._settings)
        if world_size > 1 and meets(rank_0.model):
            log = Path(rank_0.config.logging.folder) / f"rendezvous-{rank_0.port}.stderr"
            self._rendezvous = [await Rendezvous.start(self.name, world_size, log)]
        for settings in self._settings:
            environment = self._rendezvous[0].environment(settings.rank) if self._rendezvous else {}
            self._ranks.append(await AgentProcess.start(settings, environment))
        everyone = together(_announce(agent, rank) for rank, agent in enumerate(self._ranks))
        await first([everyone, self._too_late(), *(_lost_too_early(rendezvous) for rendezvous in self._rendezvous)])

    async def _too_late(self) -> None:
        """Wait for as long as a start may take.

        Raises:
            StartError: that is over.
        """
        await asyncio.sleep(self._start_seconds)
        waiting = f"the agents of {self.name} are not ready after {self._start_seconds:g} s (limits.start_seconds)"
        raise StartError(f"{waiting}: see their agent-PORT.log and agent-PORT.stderr")

    async def life(self) -> str:
        """Wait until one of the processes of a ready group has ended, and say how."""
        ranks, rendezvous = (rank.life() for rank in self._ranks), (one.ended() for one in self._rendezvous)
        return await first([*ranks, *rendezvous])

    async def stop(self) -> None:
        """Ask the ranks to end, make those that do not, and wait for all; none is left, even if this is cancelled."""
        ends = [asyncio.create_task(rank.stop(GRACE_SECONDS)) for rank in self._ranks]
        lost = [asyncio.create_task(rendezvous.ended()) for rendezvous in self._rendezvous]  # a rank cannot leave then
        try:
            if ends:
                await asyncio.wait([*ends, *lost], return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait(ends, timeout=LAST_SECONDS)
        finally:
            self.kill()
            await asyncio.gather(*ends, *lost)

    def kill(self) -> None:
        """End all processes at once."""
        for process in (*self._ranks, *self._rendezvous):
            process.kill()


def meets(model: ModelConfig) -> bool:
    """Whether the ranks of such a model compute together in MindSpore.

    Each rank of a stand-in computes the whole rule, and those of MindSpore Lite find each other by a rank table.
    """
    return model.target != "standin" and model.runtime == "mindspore"


async def _announce(agent: AgentProcess, rank: int) -> None:
    """Wait until an agent is ready, and say so."""
    ready = await agent.ready()
    line = f"{agent.name} is ready: rank {rank} of {ready.model}, pid {ready.pid}, "
    line += f"{ready.num_blocks:,} blocks of {ready.block_size} tokens"
    logger.info("%s", line)
    print(line, flush=True)  # noqa: T201


async def _lost_too_early(rendezvous: Rendezvous) -> None:
    """Wait until a rendezvous has ended.

    Raises:
        StartError: that is now; ``PortLost`` in its first seconds.
    """
    started = time.monotonic()
    lost = f"{await rendezvous.ended()} before its ranks were ready: see {rendezvous.log}"
    raise PortLost(lost) if time.monotonic() - started < FIRST_SECONDS else StartError(lost)
