"""The doctor's look at environment variables that CANN, HCCL and MindSpore obey, often without a word."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from agent import rank_table
from agent.finding import Finding, error, ok, warning
from agent.placement import VISIBLE_DEVICES, PlacementError, visible_devices

LOG_LEVEL = "GLOG_v"
LAUNCH = (
    "MS_ROLE",
    "MS_WORKER_NUM",
    "MS_SCHED_HOST",
    "MS_SCHED_PORT",
    "MS_NODE_ID",
    "RANK_ID",
    "RANK_SIZE",
    "DEVICE_ID",
)


def whole(lowest: int, highest: int | None = None) -> tuple[Callable[[str], bool], str]:
    """A whole number in a range, and how to say so."""

    def fits(text: str) -> bool:
        return text.isdecimal() and int(text) >= lowest and (highest is None or int(text) <= highest)

    return fits, f"a whole number from {lowest}" + ("" if highest is None else f" to {highest}")


def one_of(*words: str) -> tuple[Callable[[str], bool], str]:
    """One of a few words, and how to say so."""
    return lambda text: text in words, f"one of {', '.join(words)}"


def is_address(text: str) -> bool:
    """Whether it is an IP address."""
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


# By variable: what it takes, and that in words
VALUES: dict[str, tuple[Callable[[str], bool], str]] = {
    LOG_LEVEL: whole(0, 4),
    "HCCL_BUFFSIZE": whole(1),
    "HCCL_CONNECT_TIMEOUT": whole(120, 7200),
    "HCCL_DETERMINISTIC": one_of("true", "false", "strict"),
    "HCCL_EXEC_TIMEOUT": whole(0, 2147483647),
    "HCCL_IF_BASE_PORT": whole(1024, 65520),
    "HCCL_IF_IP": (is_address, "an IP address of this host"),
    "HCCL_WHITELIST_DISABLE": one_of("0", "1"),
    "MS_DISABLE_HEARTBEAT": one_of("0", "1"),
    "MS_ENABLE_LCCL": one_of("0", "1", "on", "off"),
    "MS_NODE_TIMEOUT": whole(1),
    "MS_RECEIVE_MSG_TIMEOUT": whole(1),
    "MS_TOPO_TIMEOUT": whole(1),
}


def everywhere() -> Iterator[Finding]:
    """Variables that count on every machine."""
    findings = [*values(), *logging(), *left_over(), *simulation(), *rank_tables()]
    yield from findings or [ok("environment", "no variable of MindSpore or HCCL is set that could disturb")]


def values() -> Iterator[Finding]:
    """Variables with a value that their reader would refuse, or quietly take for another."""
    for name, (fits, words) in VALUES.items():
        value = os.environ.get(name)
        if value is not None and not fits(value):
            yield error(name, f"{value!r} is not {words}", f"correct it, or unset {name}")


def logging() -> Iterator[Finding]:
    """Much logging slows every step."""
    level = os.environ.get(LOG_LEVEL)
    if level in ("0", "1"):
        words = "MindSpore logs every step, which slows it and fills the disk"
        yield warning(LOG_LEVEL, f"{level}: {words}", "unset it, or set it to 2 (warnings) or 3 (errors)")


def left_over() -> Iterator[Finding]:
    """What another launcher left: ours sets these for each agent."""
    found = [name for name in LAUNCH if name in os.environ]
    if found:
        words = "these are set by launchers such as msrun, for the processes that they start"
        yield warning("launcher variables", f"{', '.join(found)}: {words}", f"unset {' '.join(found)}")


def simulation() -> Iterator[Finding]:
    """A dry run computes nothing."""
    level = os.environ.get("MS_SIMULATION_LEVEL")
    if level is not None:
        words = f"{level!r}: MindSpore compiles graphs and runs none of them"
        yield error("MS_SIMULATION_LEVEL", words, "unset MS_SIMULATION_LEVEL")


def rank_tables() -> Iterator[Finding]:
    """The rank table, if a variable names one."""
    for name in rank_table.VARIABLES:
        if path := os.environ.get(name):
            wrong = list(rank_table.problems(Path(path)))
            advice = "write it anew, or unset the variable: agents of one host need none"
            yield from (error(name, problem, advice) for problem in wrong)
            if not wrong:
                yield ok(name, f"{path} is well formed")


def of_ascend(devices: list[int]) -> Iterator[Finding]:
    """Variables that matter where there are devices, given their logical numbers."""
    yield from listed_devices(devices)
    lists = {"LD_LIBRARY_PATH": "/lib64", "ASCEND_OPP_PATH": "/opp", "PYTHONPATH": "opp/built-in/op_impl/ai_core/tbe"}
    missing = [name for name, part in lists.items() if part not in os.environ.get(name, "")]
    if missing:
        words = "without them MindSpore finds neither driver nor operators"
        yield error("paths of CANN", f"not in {', '.join(missing)}: {words}", "source CANN's set_env.sh")
    else:
        yield ok("paths of CANN", f"in {', '.join(lists)}")


def listed_devices(devices: list[int]) -> Iterator[Finding]:
    """The devices that processes may use."""
    value = os.environ.get(VISIBLE_DEVICES)
    advice = f"write it like {VISIBLE_DEVICES}=0,1,2,3, with devices that npu-smi info -m lists"
    if value is None:
        yield ok(VISIBLE_DEVICES, "not set: every device")
        return
    try:
        absent = sorted(set(visible_devices(value)) - set(devices))
    except PlacementError as problem:
        yield error(VISIBLE_DEVICES, str(problem), advice)
        return
    if absent and devices:
        yield error(VISIBLE_DEVICES, f"{value}: this machine has no {', '.join(map(str, absent))}", advice)
    else:
        yield ok(VISIBLE_DEVICES, value)


def shown(nodes: list[int]) -> list[int]:
    """As many of the device files as processes may use devices, whose numbers in a container are others."""
    try:
        value = os.environ.get(VISIBLE_DEVICES)
        return nodes if value is None else nodes[: len(visible_devices(value))]
    except PlacementError:
        return nodes


def visible(devices: list[int]) -> list[int]:
    """Those of ``devices`` that processes may use; what cannot be read has a finding of its own."""
    try:
        value = os.environ.get(VISIBLE_DEVICES)
        return devices if value is None else [number for number in visible_devices(value) if number in devices]
    except PlacementError:
        return []
