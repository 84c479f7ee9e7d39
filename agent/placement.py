"""Where each rank of a deployment runs: its device among those of the host, and how many threads a CPU rank gets.

Devices are numbered as MindSpore numbers them: 0 is the first that the process sees. ``ASCEND_RT_VISIBLE_DEVICES`` says
which of the host's devices those are; tools like ``npu-smi`` keep to the host's own numbers, so messages say both.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.lifeline import AgentSettings
from config.serving_config import ServingConfig

VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"


class PlacementError(ValueError):
    """There is no device for a rank; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank of a model runs."""

    rank: int
    world_size: int
    device: int  # among those that the process sees; a CPU has only 0
    threads: int  # of operators on a CPU
    cpus: frozenset[int]  # that it keeps to, by the system's numbers


def place(settings: AgentSettings) -> Place:
    """The place of an agent."""
    model = settings.model
    number = model.agent_ports.index(settings.port)
    neighbours = cpu_ports(settings.config)
    cpus = frozenset(os.sched_getaffinity(0))
    if settings.port in neighbours and model.threads is None and cpu_quota() >= len(cpus):
        cpus = core_shares(len(neighbours))[neighbours.index(settings.port)]
    return Place(
        rank=settings.rank,
        world_size=settings.world_size,
        device=model.device_ids[number] if model.target == "ascend" else 0,
        threads=model.threads or max(1, physical_cores() // max(1, len(neighbours))),
        cpus=cpus,
    )


def cpu_ports(config: ServingConfig) -> list[int]:
    """The agents of a deployment that share this host's cores."""
    return [port for model in config.models if model.target == "cpu" for port in model.agent_ports]


def core_shares(agents: int) -> list[frozenset[int]]:
    """The CPUs that this process may use, divided among so many agents: to each its own cores, which are neighbours.

    Where some would have a single core, all have them all: an agent's other threads are in its operators' way there.
    """
    cores = list(cores_by_place().values())
    if len(cores) < 2 * agents:
        return [frozenset().union(*cores)] * agents
    ends = [len(cores) * i // agents for i in range(agents + 1)]
    return [frozenset().union(*cores[first:last]) for first, last in itertools.pairwise(ends)]


def host_device(device: int, environment: Mapping[str, str] = os.environ) -> int:
    """The host's own number of a device that the process sees under another.

    Raises:
        PlacementError: the process does not see so many, or the variable cannot mean what it seems to mean.
    """
    if VISIBLE_DEVICES not in environment:
        return device
    visible = visible_devices(environment[VISIBLE_DEVICES])
    if device >= len(visible):
        raise PlacementError(
            f"device {device} is not there: {VISIBLE_DEVICES}={environment[VISIBLE_DEVICES]} shows {len(visible)}, "
            "which are numbered from 0; show more, or choose others"
        )
    return visible[device]


def visible_devices(text: str) -> list[int]:
    """The host's numbers of the visible devices, as CANN reads them, where CANN reads all of them.

    It takes ascending numbers with commas between them, and what follows a mistake does not count. A mistake is never
    meant, so it is an error here.

    >>> visible_devices("1,2,6")
    [1, 2, 6]

    Raises:
        PlacementError: CANN would stop in the middle of it.
    """
    devices: list[int] = []
    for entry in text.split(","):
        if not re.fullmatch(r"[0-9]{1,4}", entry):
            raise PlacementError(
                f"{VISIBLE_DEVICES}={text}: CANN reads it up to {entry!r} only; write numbers with commas between them "
                "and nothing else, no space either"
            )
        if devices and int(entry) <= devices[-1]:
            raise PlacementError(
                f"{VISIBLE_DEVICES}={text}: {entry} comes after {devices[-1]}; CANN wants them ascending"
            )
        devices.append(int(entry))
    return devices


def physical_cores() -> int:
    """The CPU cores that this process may use, threads of one core counted once where the system tells."""
    return min(len(cores_by_place()), cpu_quota())


def cores_by_place() -> dict[tuple[int, int], frozenset[int]]:
    """The CPUs of each core that this process may use, by socket and number in it, neighbours beside each other."""
    cores: dict[tuple[int, int], set[int]] = defaultdict(set)
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            package, core = -1, cpu
        cores[package, core].add(cpu)
    return {place: frozenset(cores[place]) for place in sorted(cores)}


def cpu_quota() -> int:
    """Cores that a container's CPU time comes to, rounded up; a great many where it is not limited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no control group of version 2, or "max"
        return sys.maxsize
