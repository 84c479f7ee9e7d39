"""The one file that an acceptance leaves: for people first, then the same as data."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import msgspec

from agent.acceptance import StageResult
from config.serving_config import Target
from config.version import __version__

REPORT_VERSION = 1  # of the shape of the data, which docs/doctor.md describes
LONGEST = 300  # characters of a cell


def as_data(target: Target, doctor: Mapping[str, Any], stages: Sequence[StageResult]) -> dict[str, Any]:
    """The report as data. No name, address or path of the machine is in it beside what the findings say."""
    return {
        "version": REPORT_VERSION,
        "release": __version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "target": target,
        "passed": all(stage.outcome != "failed" for stage in stages),  # what is skipped needs such a one, or a device
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cpus": os.cpu_count()},
        "stages": msgspec.to_builtins(stages),
        "doctor": doctor,
    }


def as_markdown(data: Mapping[str, Any]) -> str:
    """The file."""
    return "\n".join(_lines(data)) + "\n"


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    verdict = "passed" if data["passed"] else "not passed"
    machine = data["machine"]
    yield f"# Acceptance of {data['release']} on {data['target']}: {verdict}"
    yield ""
    yield f"{data['time']}, {machine['system']} on {machine['architecture']}, {machine['cpus']} CPUs"
    yield ""
    yield "| stage | outcome | seconds | |"
    yield "|---|---|--:|---|"
    for stage in data["stages"]:
        found = " ".join(stage["found"].split())[:LONGEST].replace("|", "\\|")  # whole in the data
        yield f"| {stage['stage']} | {stage['outcome']} | {stage['seconds']:.1f} | {found} |"
    yield ""
    yield "What the doctor said:"
    yield ""
    for one in data["doctor"]["findings"]:
        advice = f" — {one['advice']}" if one["advice"] else ""
        yield f"- {one['level']}: {one['check']}: {one['found']}{advice}"
    yield ""
    yield "```json"
    yield msgspec.json.format(msgspec.json.encode(data), indent=1).decode()
    yield "```"
