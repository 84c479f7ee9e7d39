"""The doctor's look at the devices: which there are, how they are, and whether a deployment's models fit into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.ascend_host import AscendHost
from agent.doctor_environment import visible
from agent.finding import Finding, error, ok, warning
from agent.model_size import Need, gib
from agent.npu_smi import Chip, ChipState

LOOK = "see npu-smi info -t health -i {} for the reason; dmesg and the driver's logs say more"


def devices(host: AscendHost, chips: list[Chip]) -> Iterator[Finding]:
    """The devices that the driver knows, and those whose files are here."""
    nodes = host.device_nodes()
    if not chips:
        advice = (
            "run npu-smi info -m by hand: if it fails too, the driver or this user's group (HwHiAiUser) is at fault"
        )
        yield error("devices", f"npu-smi names none; device files: {len(nodes)}", advice)
        return
    yield ok("devices", f"{len(chips)}: {', '.join(sorted({chip.name for chip in chips}))}")
    if len(nodes) < len(chips):
        advice = "in a container, give it --device=/dev/davinciN for each device that it is to use"
        yield warning("device files", f"{len(nodes)} of /dev/davinciN for {len(chips)} devices", advice)
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc"):
        if not (host.device_files / name).exists():
            yield error("device files", f"/dev/{name} is not here", f"in a container, give it --device=/dev/{name}")


def states(states: Mapping[Chip, ChipState]) -> Iterator[Finding]:
    """Health and memory of each device."""
    for chip, state in states.items():
        if state.health == "OK":
            yield ok("health", f"{chip}: OK")
        elif state.health in ("Warning", "unknown"):
            yield warning("health", f"{chip}: {state.health}", LOOK.format(chip.npu_id))
        else:
            yield error("health", f"{chip}: {state.health}", LOOK.format(chip.npu_id))
        yield ok("memory", f"{chip}: {gib(state.free_bytes)} free of {gib(state.memory_bytes)}")


def room(needs: list[Need], states: Mapping[Chip, ChipState]) -> Iterator[Finding]:
    """Whether each agent of a deployment has its device, with enough free memory."""
    free = {chip.logic_id: state.free_bytes for chip, state in states.items()}
    numbers = visible(list(free))
    agents = [(device, need.rank_bytes) for need in needs for device in need.devices]
    if not agents:
        return
    if absent := sorted({device for device, _ in agents if device >= len(numbers)}):
        advice = "use fewer ranks, choose other devices, or make more of them visible"
        words = f"{len(numbers)} visible, numbered from 0; not there: {', '.join(map(str, absent))}"
        yield error("devices for the models", words, advice)
        return
    places = [(numbers[device], size, free[numbers[device]]) for device, size in agents]
    known = [left for _, _, left in places if left is not None]
    if len(known) < len(places):
        yield warning("memory for the models", "unknown: npu-smi does not say how much is free", "see npu-smi info")
    elif short := [(number, size, left) for number, size, left in places if left is not None and left < size]:
        number, size, left = short[0]
        advice = "stop what else runs there, choose another device, lower cache_memory, or export for more ranks"
        words = f"device {number}: a rank needs {gib(size)}; free: {gib(left)}"
        yield error("memory for the models", words, advice)
    else:
        yield ok(
            "memory for the models",
            f"{gib(max(size for _, size, _ in places))} a rank at most; free: {gib(min(known))}",
        )
