"""Where ranks run: devices by CANN's rules, and a CPU's cores divided among the agents of a deployment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from agent import placement
from agent.lifeline import AgentSettings
from agent.placement import (
    VISIBLE_DEVICES,
    PlacementError,
    host_device,
    physical_cores,
    place,
    visible_devices,
)
from config.serving_config import ModelConfig, ServingConfig


def config(*models: dict[str, Any]) -> ServingConfig:
    defaults = {"path": "x", "names": ("a",), "agent_ports": (1,)}
    return ServingConfig(models=tuple(ModelConfig(**{**defaults, **model}) for model in models))


@pytest.mark.parametrize(("text", "devices"), [("0", [0]), ("1,2,6", [1, 2, 6]), ("10", [10])])
def test_visible_devices(text: str, devices: Sequence[int]) -> None:
    assert visible_devices(text) == devices


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "up to '' only"),
        ("0, 1", "up to ' 1' only"),
        ("0,1,", "up to '' only"),
        ("0-3", "up to '0-3' only"),
        ("0,-1", "up to '-1' only"),
        ("0,99999", "up to '99999' only"),
        ("0,٣", "up to '٣' only"),
        ("2,1", "1 comes after 2"),
        ("1,1", "1 comes after 1"),
    ],
)
def test_what_cann_would_read_in_part_is_refused(text: str, problem: str) -> None:
    with pytest.raises(PlacementError, match=problem):
        visible_devices(text)


def test_devices_of_the_host() -> None:
    assert host_device(5, {}) == 5
    assert [host_device(device, {VISIBLE_DEVICES: "4,6"}) for device in (0, 1)] == [4, 6]
    with pytest.raises(PlacementError, match="device 2 is not there: ASCEND_RT_VISIBLE_DEVICES=4,6 shows 2"):
        host_device(2, {VISIBLE_DEVICES: "4,6"})


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, [0, 1, 2, 3]), ({"devices": (6, 7, 2, 3)}, [6, 7, 2, 3]), ({"device_start": 4}, [4, 5, 6, 7])],
)
def test_each_agent_has_its_device(chosen: dict[str, object], expected: list[int]) -> None:
    one = config({"target": "ascend", "agent_ports": (1, 2, 3, 4), "data_parallel": 2, **chosen})
    places = [place(AgentSettings(one, 0, group, rank)) for group in range(2) for rank in range(2)]
    assert [(where.rank, where.world_size) for where in places] == [(0, 2), (1, 2)] * 2
    assert [where.device for where in places] == expected


def test_cores_are_divided_among_all_cpu_agents() -> None:
    cores = physical_cores()
    assert place(AgentSettings(config({}), 0, 0, 0)).threads == cores
    two = config({"agent_ports": (1, 2)}, {"target": "ascend", "agent_ports": (3, 4)})
    assert place(AgentSettings(two, 0, 0, 1)).threads == max(1, cores // 2)
    many = config({"agent_ports": tuple(range(1, 1000))}, {"agent_ports": (1000,)})
    assert place(AgentSettings(many, 1, 0, 0)).threads == 1
    assert place(AgentSettings(config({"threads": 7}, {}), 0, 0, 0)).threads == 7


TWO_SOCKETS = {(0, 0): {0, 4}, (0, 1): {1, 5}, (1, 0): {2, 6}, (1, 1): {3, 7}}  # CPUs of each core


def test_several_agents_keep_to_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(placement, "cores_by_place", lambda: {p: frozenset(cpus) for p, cpus in TWO_SOCKETS.items()})
    monkeypatch.setattr(placement, "cpu_quota", lambda: 99)

    def cpus_of(*models: dict[str, Any], model: int = 0, rank: int = 0) -> frozenset[int]:
        return place(AgentSettings(config(*models), model, 0, rank)).cpus

    everything = frozenset(range(8))
    two = {"agent_ports": (1, 2)}
    assert cpus_of({}) == everything
    assert [cpus_of(two, rank=rank) for rank in (0, 1)] == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert cpus_of({}, {"agent_ports": (2,)}, model=1) == {2, 3, 6, 7}
    assert cpus_of({**two, "threads": 4}) == everything, "who chooses threads knows of more than this deployment"
    assert cpus_of({"agent_ports": (1, 2, 3)}) == everything, "one of them would have a single core"
    assert cpus_of({**two, "target": "ascend"}) == everything
    monkeypatch.setattr(placement, "cpu_quota", lambda: 4)
    assert cpus_of(two) == everything, "other containers have the same CPUs"
