"""The releases of what we stand on that this version is known to work with, and who says so."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Supported:
    """The releases of one program; others may work, but nobody has said so."""

    releases: tuple[str, ...]  # major.minor
    source: str

    def has(self, version: str) -> bool:
        """Whether a full version such as ``8.5.0.2.220`` is of one of these releases."""
        return release(version) in self.releases

    def __str__(self) -> str:
        return ", ".join(self.releases)


SUPPORTED = {
    "python": Supported(("3.10", "3.11", "3.12"), "MindSpore 2.10.0 has packages for these"),
    "mindspore": Supported(("2.10",), "setup.py: models are exported and run by this release"),
    "numpy": Supported(("1.26",), "setup.py: MindSpore 2.10 breaks bfloat16 with numpy 2"),
    "cann": Supported(
        ("8.2", "8.3", "8.5", "9.0", "9.1"), "MindSpore 2.10.0, run_check/_check_version.py, which checks it at import"
    ),
    "mindspore_lite": Supported(("2.7", "2.8", "2.9", "2.10"), "its API of 2.7.0: ModelGroup with shared weights"),
}

_NOTES_8_5_0 = "release notes of CANN 8.5.0, mapping between CANN and driver versions"
_NOTES_9_1_0 = "release notes of CANN 9.1.0, CANN and Ascend HDK version compatibility"
_TO_26_1 = ("25.2", "25.3", "25.5", "25.7", "26.0", "26.1")
# Drivers (Ascend HDK) by the release of CANN, as hiascend.com publishes them. Of 8.2, 8.3 and 8.5.1 no table was found.
DRIVERS = {
    "8.5.0": Supported(("25.0", "25.2", "25.3", "25.5"), _NOTES_8_5_0),
    "8.5.2": Supported(("25.0", *_TO_26_1), _NOTES_9_1_0),
    "9.0": Supported(("25.0", *_TO_26_1), _NOTES_9_1_0),
    "9.1": Supported(_TO_26_1, _NOTES_9_1_0),
}


def drivers(cann: str) -> Supported | None:
    """The drivers of a full CANN version such as ``8.5.0.2.220``; None: nobody has said so."""
    found = (known for known in DRIVERS if f"{cann}.".startswith(f"{known}."))
    return DRIVERS.get(next(found, ""))


def release(version: str) -> str | None:
    """``8.5`` of ``8.5.0.2.220`` or ``8.5.RC1``; None where it does not begin like a version."""
    match = re.match(r"\s*(\d+)\.(\d+)", version)
    return f"{int(match[1])}.{int(match[2])}" if match else None
