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
    """Whether each rank of a deployment finds a device with enough free memory."""
    numbers = visible([chip.logic_id for chip in states])
    free = [state.free_bytes for chip, state in states.items() if chip.logic_id in numbers]
    ranks = [need.rank_bytes for need in needs for _ in range(need.ranks)]
    if not ranks:
        return
    if len(ranks) > len(free):
        advice = "use fewer ranks, or make more devices visible"
        yield error("devices for the models", f"{len(ranks)} agents, {len(free)} devices", advice)
        return
    known = sorted((size for size in free if size is not None), reverse=True)
    if len(known) < len(free):
        yield warning("memory for the models", "unknown: npu-smi does not say how much is free", "see npu-smi info")
    elif any(need > room for need, room in zip(sorted(ranks, reverse=True), known, strict=False)):
        advice = "stop what else runs there, lower cache_memory, or export for more ranks"
        yield error("memory for the models", f"a rank needs {gib(max(ranks))}; free: {gib(min(known))}", advice)
    else:
        yield ok("memory for the models", f"{gib(max(ranks))} a rank at most; free: {gib(min(known))}")
