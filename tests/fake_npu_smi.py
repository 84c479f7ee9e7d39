"""A program that answers like ``npu-smi``, in the layouts of several drivers: as their manuals and users show them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

Answers = Mapping[str, str]  # by arguments; anything else fails, as it does where a driver does not know an option

FIELD = "\t{:<30} : {}\n".format


def card(npu_id: int, **topics: str) -> dict[str, str]:
    """The answers about one card, without a chip in the question."""
    return {f"info -t {topic} -i {npu_id}": text for topic, text in topics.items()}


def chip(npu_id: int, chip_id: int, **topics: str) -> dict[str, str]:
    """The answers about one chip."""
    return {f"info -t {topic} -i {npu_id} -c {chip_id}": text for topic, text in topics.items()}


def hbm(total: int) -> str:
    return FIELD("DDR Capacity(MB)", 0) + FIELD("HBM Capacity(MB)", total) + FIELD("HBM Clock Speed(MHz)", 1600)


def usages(total: int, percent: int) -> str:
    return (
        FIELD("HBM Capacity(MB)", total)
        + FIELD("HBM Usage Rate(%)", percent)
        + FIELD("Aicore Usage Rate(%)", 0)
        + FIELD("HBM Bandwidth Usage Rate(%)", 0)
        + FIELD("Chip ID", 0)
    )


MAP_910B = """\tNPU ID                         Chip ID                        Chip Logic ID                  Chip Name
\t0                              0                              0                              Ascend 910B3
\t0                              1                              -                              Mcu
\t1                              0                              1                              Ascend 910B3
\t1                              1                              -                              Mcu
"""
# Two cards of one chip each, a management unit on each; all that we ask is answered
ATLAS_A2: Answers = {
    "info -m": MAP_910B,
    **card(
        0, board=FIELD("NPU ID", 0) + FIELD("Software Version", "25.2.0") + FIELD("Firmware Version", "7.7.0.6.236")
    ),
    **chip(
        0,
        0,
        health=FIELD("Health Status", "OK") + FIELD("Error Code", "NA"),
        memory=hbm(65536),
        usages=usages(65536, 5),
    ),
    **chip(
        1,
        0,
        health=FIELD("Health Status", "Alarm") + FIELD("Error Code", "80E01801"),
        memory=hbm(65536),
        usages=usages(65536, 0),
    ),
}
# Cards of two chips, with physical numbers in the map; the table has bars
ATLAS_A3: Answers = {
    "info -m": """| NPU ID | Chip ID | Chip Logic ID | Chip Phy-ID | Chip Name |
| 0      | 0       | 0             | 4           | Ascend910 |
| 0      | 1       | 1             | 5           | 910C      |
| 0      | 2       | -             | -           | Mcu       |
""",
    **chip(0, 0, health=FIELD("Health", "OK"), memory=hbm(65536), usages=usages(65536, 50)),
    **chip(0, 1, health=FIELD("Health", "warning"), memory=hbm(65536), usages=usages(65536, 0)),
}
# A driver that has no map, takes no chip, and does not say how much is in use
OLD: Answers = {
    "info -l": FIELD("Total Count", 2) + "".join(FIELD("NPU ID", i) + FIELD("Chip Count", 1) + "\n" for i in (2, 5)),
    **card(2, health=FIELD("Healthy", "OK"), memory=FIELD("DDR Capacity(MB)", 8192)),
    **card(5, health="no such field", memory="| 0 | ? |"),
}
# The driver is there but does not work
BROKEN: Answers = {"info -m": "dcmi module initialize failed. ret is -8005\n"}


def install(folder: Path, answers: Answers) -> Path:
    """Write the program and what it says into ``folder``, which belongs on the path then."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = "".join(f"{shlex.quote(question)}) printf %s {shlex.quote(text)};;\n" for question, text in answers.items())
    program = folder / "npu-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in\n{cases}*) echo "unknown option" >&2; exit 1;;\nesac\n', encoding="utf-8"
    )
    program.chmod(0o755)
    return folder
