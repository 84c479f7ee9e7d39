"""What of Ascend is installed on this machine: device files, driver, firmware, CANN."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from agent import npu_smi


@dataclass(frozen=True)
class AscendHost:
    """The places where Ascend's packages lie."""

    root: Path = Path("/usr/local/Ascend")
    device_files: Path = Path("/dev")

    def present(self) -> bool:
        """Whether there is a device: its file, or the program of its driver."""
        return bool(self.device_nodes()) or npu_smi.installed()

    def device_nodes(self) -> list[int]:
        """The numbers N of the files ``davinciN``: in a container, the devices that were given to it."""
        numbers = (re.fullmatch(r"davinci(\d+)", path.name) for path in self.device_files.glob("davinci*"))
        return sorted(int(match[1]) for match in numbers if match)

    def driver(self) -> dict[str, str]:
        """The driver's ``version.info``; empty where there is none."""
        return settings(self.root / "driver" / "version.info")

    def firmware(self) -> dict[str, str]:
        """The firmware's ``version.info``; containers do not have it."""
        return settings(self.root / "firmware" / "version.info")

    def cann(self) -> str | None:
        """CANN's version, as MindSpore reads it and where MindSpore looks for it first; None if there is none."""
        named = os.environ.get("ASCEND_HOME_PATH")
        homes = [self.root / name for name in ("ascend-toolkit/latest", "cann", "nnae/latest")]
        for home in [Path(named)] if named else homes:
            for file in ("compiler/version.info", "runtime/version.info", "opp/version.info"):
                if version := settings(home / file).get("Version"):
                    return version
        return None


def settings(path: Path) -> dict[str, str]:
    """The lines ``name=value`` of a file; nothing if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, equals, value in (line.partition("=") for line in lines) if equals}
