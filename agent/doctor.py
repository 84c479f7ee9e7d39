"""Looks at a machine, and at a deployment if one is named: ``python -m agent.doctor [CONFIG]``.

Each line is ok, a warning or an error, with what to do. Exit codes: 0, 1 if there is an error, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from agent import acceptance_report, doctor_devices, doctor_environment, doctor_host, doctor_versions, npu_smi
from agent.acceptance import Acceptance
from agent.ascend_host import AscendHost
from agent.finding import LEVELS, Finding, error, ok
from agent.model_size import Need, needs
from agent.served_model import ROOT
from config.serving_config import ConfigError, ServingConfig, Target, load
from config.version import __version__

JSON_VERSION = 1  # of the shape of --json, which docs/doctor.md describes
ACCEPTANCE = ROOT / "output" / "acceptance"
ACCEPTANCE_REPORT = ACCEPTANCE.with_suffix(".md")
NO_DEVICE = "no Ascend device here"

Report = dict[str, list[Finding]]  # by area


def examine(path: str | None, host: AscendHost) -> Report:
    """Every finding, by area."""
    report = {
        "versions": list(doctor_versions.packages()),
        "host": list(doctor_host.host()),
        "environment": list(doctor_environment.everywhere()),
    }
    config: ServingConfig | None = None
    if path is not None:
        try:
            config = load(path)
            report["deployment"] = list(doctor_host.deployment(config))
        except ConfigError as problem:
            report["deployment"] = [error("configuration", str(problem), "correct the file")]
    on_devices = [need for need in needs(config) if need.target == "ascend"] if config else []
    wanted = config is not None and any(model.target == "ascend" for model in config.models)
    report["ascend"] = list(ascend(host, on_devices) if host.present() else without_device(wanted))
    return report


def ascend(host: AscendHost, needs: list[Need]) -> Iterator[Finding]:
    """All that concerns the devices."""
    chips = npu_smi.chips()
    states = {chip: npu_smi.state(chip) for chip in chips}
    yield from doctor_versions.ascend(host, chips)
    yield from doctor_devices.devices(host, chips)
    yield from doctor_devices.states(states)
    yield from doctor_environment.of_ascend([chip.logic_id for chip in chips])
    yield from doctor_devices.room(needs, states)


def without_device(wanted: bool) -> Iterator[Finding]:
    """The one line of a machine without a device."""
    if wanted:
        yield error("devices", f"{NO_DEVICE}, and this deployment needs one", "start it on a host that has one")
    else:
        yield ok("devices", NO_DEVICE)


def worst(findings: Iterable[Finding]) -> str:
    """The worst level among them."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def as_json(report: Report) -> dict[str, Any]:
    """The report as data, of the shape that docs/doctor.md describes."""
    findings = [{"area": area, **msgspec.to_builtins(one)} for area, found in report.items() for one in found]
    everything = (one for found in report.values() for one in found)
    return {"version": JSON_VERSION, "release": __version__, "worst": worst(everything), "findings": findings}


def as_text(report: Report) -> Iterator[str]:
    """The report as lines."""
    for area, findings in report.items():
        yield f"{area}:"
        for one in findings:
            advice = f" — {one.advice}" if one.advice else ""
            yield f"  {one.level:<8} {one.check}: {one.found}{advice}"
    levels = [one.level for findings in report.values() for one in findings]
    yield ", ".join(f"{levels.count(level)} {level}" for level in LEVELS)


def accept(report: Report, host: AscendHost) -> bool:
    """Run the whole chain and write its report: whether no stage failed."""
    target: Target = "ascend" if host.present() else "cpu"
    devices = len(doctor_environment.shown(host.device_nodes())) if target == "ascend" else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is being tried is stopped on the way
    stages = []
    for stage in Acceptance(target, ACCEPTANCE, devices).run():
        stages.append(stage)
        print(f"{stage.outcome:<8} {stage.stage}, {stage.seconds:.0f} s: {stage.found}", flush=True)  # noqa: T201
    data = acceptance_report.as_data(target, as_json(report), stages)
    ACCEPTANCE_REPORT.parent.mkdir(parents=True, exist_ok=True)
    ACCEPTANCE_REPORT.write_text(acceptance_report.as_markdown(data), encoding="utf-8")
    print(f"the report is {ACCEPTANCE_REPORT.relative_to(ROOT)}", flush=True)  # noqa: T201
    return bool(data["passed"])


def main(arguments: list[str] | None = None) -> int:
    """The command line: its exit code."""
    parser = argparse.ArgumentParser(prog="python -m agent.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a deployment's YAML file")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as data, of the shape in docs/doctor.md")
    form.add_argument("--accept", action="store_true", help="run the whole chain too, and write output/acceptance.md")
    options = parser.parse_args(arguments)
    host = AscendHost()
    report = examine(options.config, host)
    if options.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(as_json(report))) + b"\n")
    else:
        print("\n".join(as_text(report)), flush=True)  # noqa: T201
    try:
        passed = not options.accept or accept(report, host)
    except KeyboardInterrupt:
        return 130
    return int(worst(one for found in report.values() for one in found) == "error" or not passed)


if __name__ == "__main__":
    sys.exit(main())
