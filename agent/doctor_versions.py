"""The doctor's look at versions: what is installed, against ``agent.supported_versions``."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from agent import npu_smi
from agent.ascend_host import AscendHost
from agent.finding import Finding, error, ok, warning
from agent.supported_versions import SUPPORTED, drivers

INSTALL = "run make setup, or pip install --constraint constraints.txt --editable ."


def packages() -> Iterator[Finding]:
    """Python and the packages that models run on."""
    yield judged("python", platform.python_version(), f"use Python {SUPPORTED['python']}")
    for name in ("mindspore", "numpy"):
        yield judged(name, installed(name), INSTALL)
    yield lite(installed("mindspore-lite"))


def judged(name: str, found: str | None, advice: str) -> Finding:
    """One version against the table."""
    supported = SUPPORTED[name]
    if found is None:
        return error(name, "not installed", advice)
    if supported.has(found):
        return ok(name, found)
    return error(name, f"{found}; supported: {supported} ({supported.source})", advice)


def installed(distribution: str) -> str | None:
    """The version of an installed package, None if it is not. It is not imported: that can take a minute, or fail."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def lite(found: str | None) -> Finding:
    """MindSpore Lite, which only some models need."""
    supported = SUPPORTED["mindspore_lite"]
    if found is None:
        return ok("mindspore_lite", "not installed; only models that MindSpore Lite runs need it")
    if supported.has(found):
        return ok("mindspore_lite", found)
    advice = "install a newer one from MindSpore's download page, or do without: MindSpore itself is the default"
    return warning("mindspore_lite", f"{found}; supported: {supported} ({supported.source})", advice)


def ascend(host: AscendHost, chips: list[npu_smi.Chip]) -> Iterator[Finding]:
    """Driver, firmware and CANN."""
    board = npu_smi.board(chips[0]) if chips else {}
    driver = host.driver()
    found = host.cann()
    version_of_driver = driver.get("package_version") or driver.get("Version") or board.get("software version")
    yield driver_version(version_of_driver, found)
    firmware = host.firmware().get("Version") or board.get("firmware version")
    yield firmware_version(firmware, driver.get("compatible_version_fw", ""))
    if found is None:
        advice = "install CANN's toolkit and the kernels of this chip, and source its set_env.sh"
        yield error("cann", "not found, neither by ASCEND_HOME_PATH nor in its usual places", advice)
    else:
        yield judged("cann", found, "install one of these and source its set_env.sh")


def driver_version(found: str | None, cann: str | None) -> Finding:
    """The driver, against what the release notes of the CANN that is here say of it, where such notes are known."""
    if not found:
        advice = "install the driver; in a container, mount /usr/local/Ascend/driver and npu-smi of the host"
        return error("driver", "not found", advice)
    supported = drivers(cann) if cann else None
    if supported is None or supported.has(found):
        return ok("driver", found)
    words = f"{found}; CANN {cann} is for {supported} ({supported.source})"
    return warning("driver", words, "install one of these, or a CANN for this driver")


def firmware_version(found: str | None, compatible: str) -> Finding:
    """The firmware against what the driver itself says it works with, such as ``[7.0.0,7.7.99]``."""
    if not found:
        return ok("firmware", "unknown; a container does not see it")
    bounds = [numbers(bound) for bound in compatible.strip("[] ").split(",")]
    if len(bounds) == 2 and all(bounds) and not bounds[0] <= numbers(found)[:3] <= bounds[1]:
        return error("firmware", f"{found}; the driver works with {compatible}", "install the firmware of the driver")
    return ok("firmware", found)


def numbers(text: str) -> list[int]:
    """The numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", text)]
