"""What ``npu-smi`` says of the devices of this machine.

Its layout differs between drivers, so it is read leniently: a value that cannot be found is unknown, never an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

PROGRAM = "npu-smi"
SECONDS = 30.0  # for an answer; a driver in trouble gives none
MIB = 1 << 20  # what npu-smi calls MB: 65536 of them are 64 GiB

Health = Literal["OK", "Warning", "Alarm", "Critical", "unknown"]


@dataclass(frozen=True)
class Chip:
    """One device that can compute. ``npu-smi`` names it by card and chip, everything else by its logical number."""

    npu_id: int
    chip_id: int
    logic_id: int
    name: str

    def __str__(self) -> str:
        return f"device {self.logic_id} (NPU {self.npu_id}, chip {self.chip_id})"


@dataclass(frozen=True)
class ChipState:
    """How a device is at the moment."""

    health: Health = "unknown"
    memory_bytes: int | None = None  # None: unknown
    free_bytes: int | None = None


def installed() -> bool:
    """Whether the program is on the path."""
    return shutil.which(PROGRAM) is not None


def chips() -> list[Chip]:
    """The devices of this machine, by logical number; empty where ``npu-smi`` names none."""
    found = list(parse_map(ask("info", "-m"))) or list(parse_list(ask("info", "-l")))
    return sorted(found, key=lambda chip: chip.logic_id)


def state(chip: Chip) -> ChipState:
    """How one device is."""
    health = fields(ask_about(chip, "health"))
    memory, usages = fields(ask_about(chip, "memory")), fields(ask_about(chip, "usages"))
    return ChipState(health_of(health), *memory_of({**memory, **usages}))


def board(chip: Chip) -> dict[str, str]:
    """What the card says of itself, its driver's and firmware's versions among it."""
    return fields(ask("info", "-t", "board", "-i", str(chip.npu_id)))


def ask(*arguments: str) -> str:
    """What the program prints; nothing if it fails or does not answer."""
    try:
        done = subprocess.run(
            [PROGRAM, *arguments], capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def ask_about(chip: Chip, topic: str) -> str:
    """One topic of one device. Some drivers take no chip where a card has one only."""
    card = ("info", "-t", topic, "-i", str(chip.npu_id))
    return ask(*card, "-c", str(chip.chip_id)) or ask(*card)


def parse_map(text: str) -> Iterator[Chip]:
    """Read ``info -m``: card, chip and logical number, a physical one in some releases, and a name.

    What is no computing device (``Mcu``) has no logical number.
    """
    for line in text.splitlines():
        match = re.match(r"[\s|]*(\d+)[\s|]+(\d+)[\s|]+(\d+)[\s|]+(?:(?:\d+|-)[\s|]+)?(\w[^|]*)", line)
        if match:
            yield Chip(int(match[1]), int(match[2]), int(match[3]), " ".join(match[4].split()))


def parse_list(text: str) -> Iterator[Chip]:
    """Read ``info -l``: cards with the number of their chips, which are counted through in this order."""
    count = 0
    for npu_id, chip_count in re.findall(r"NPU ID\s*:\s*(\d+)\s+(?:Chip Count\s*:\s*(\d+))?", text + "\n"):
        for chip_id in range(int(chip_count or 1)):
            yield Chip(int(npu_id), chip_id, count, "unknown")
            count += 1


def fields(text: str) -> dict[str, str]:
    """The lines ``HBM Capacity(MB) : 65536`` of an answer as ``{"hbm capacity": "65536"}``, the first of each name."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.strip(" \t|").partition(":")
        if colon:
            found.setdefault(re.sub(r"\(.*?\)", "", name).strip().lower(), value.strip())
    return found


def health_of(values: dict[str, str]) -> Health:
    """``Health``, ``Healthy`` or ``Health Status``, whatever it is called in this release."""
    said = next((value for name, value in values.items() if name.startswith("health")), "")
    return next((health for health in get_args(Health) if health.lower() == said.lower()), "unknown")


def memory_of(values: dict[str, str]) -> tuple[int | None, int | None]:
    """Bytes of a device's memory and of what is free of it; devices without HBM have DDR."""
    for kind in ("hbm", "ddr", "memory"):
        total, rate = number(values.get(f"{kind} capacity")), number(values.get(f"{kind} usage rate"))
        if total:
            capacity = int(total * MIB)
            known = rate is not None and rate <= 100
            return capacity, int(capacity * (1 - rate / 100)) if known and rate is not None else None
    return None, None


def number(text: str | None) -> float | None:
    """A number at the begin of a value, None if there is none."""
    match = re.match(r"\d+(?:\.\d+)?", text or "")
    return float(match[0]) if match else None
