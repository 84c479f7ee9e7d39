"""The doctor: what it finds on machines with and without devices, and what it says to do."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_npu_smi
import lite_pairs
import msgspec
import pytest
import yaml
from fake_npu_smi import Answers
from hypothesis import given
from hypothesis import strategies as st
from serving_processes import ROOT, standin_deployment

from agent import doctor, doctor_environment, doctor_host, npu_smi, rank_table
from agent.ascend_host import AscendHost
from agent.doctor_versions import driver_version, firmware_version, judged, lite
from agent.finding import Finding
from agent.model_size import RUNTIME_BYTES, needs
from agent.placement import VISIBLE_DEVICES
from agent.supported_versions import DRIVERS, SUPPORTED, release
from config.manifest import read_manifest, write_manifest
from config.serving_config import load

GIB = 1 << 30


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine that runs the tests counts."""
    for name in (*doctor_environment.VALUES, *doctor_environment.LAUNCH, *rank_table.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name in (VISIBLE_DEVICES, "MS_SIMULATION_LEVEL", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def host(tmp_path: Path) -> AscendHost:
    """A host with driver, firmware, CANN and two devices."""
    files = {
        "driver/version.info": "Version=25.2.0\npackage_version=25.2.0\ncompatible_version_fw=[7.0.0,7.7.99]\n",
        "firmware/version.info": "Version=7.7.0.6.236\n",
        "ascend-toolkit/latest/compiler/version.info": "Version=8.5.0.2.220\nversion_dir=8.5.0\n",
    }
    for name, text in files.items():
        path = tmp_path / "Ascend" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc"):
        (tmp_path / "dev" / name).touch()
    return AscendHost(tmp_path / "Ascend", tmp_path / "dev")


def with_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: Answers) -> None:
    """Put an ``npu-smi`` that says this on the path, and what CANN's set_env.sh sets into the environment."""
    folder = fake_npu_smi.install(tmp_path / "bin", answers)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/Ascend/ascend-toolkit/latest/lib64")
    monkeypatch.setenv("ASCEND_OPP_PATH", "/usr/local/Ascend/ascend-toolkit/latest/opp")
    monkeypatch.setenv("PYTHONPATH", "/usr/local/Ascend/ascend-toolkit/latest/opp/built-in/op_impl/ai_core/tbe")


def found(findings: list[Finding], check: str) -> list[Finding]:
    return [one for one in findings if one.check == check]


def level_of(findings: list[Finding], check: str) -> str:
    return doctor.worst(found(findings, check))


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent.doctor", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


def test_a_machine_without_devices_says_so_once(tmp_path: Path) -> None:
    report = doctor.examine(None, AscendHost(tmp_path, tmp_path))
    assert report["ascend"] == [Finding("devices", "ok", doctor.NO_DEVICE)]
    assert "ascend" not in "\n".join(one.check for area in report.values() for one in area).lower()


def test_the_command_says_what_to_do_and_fails_where_something_is_wrong(tmp_path: Path) -> None:
    deployment = standin_deployment(tmp_path)
    (tmp_path / "logs").mkdir()
    good = run(deployment.config_path)
    assert good.returncode == 0, good.stdout
    assert re.search(r"^\d+ ok, 0 warning, 0 error$", good.stdout, re.MULTILINE)
    with socket.create_server(("127.0.0.1", deployment.port)):
        taken = run(deployment.config_path)
    assert taken.returncode == 1
    assert f"error    server.port: cannot listen on 127.0.0.1:{deployment.port}" in taken.stdout
    assert "— stop what listens there" in taken.stdout


def test_the_json_has_the_shape_that_the_document_shows(tmp_path: Path) -> None:
    shown = json.loads(re.findall(r"^```json\n(.*?)^```$", (ROOT / "docs/doctor.md").read_text(), re.M | re.S)[0])
    said = json.loads(run("--json").stdout)
    assert said.keys() == shown.keys()
    assert said["version"] == shown["version"] == doctor.JSON_VERSION
    assert {tuple(one) for one in said["findings"]} == {tuple(one) for one in shown["findings"]}
    assert said["worst"] in ("ok", "warning", "error")


def test_all_problems_of_a_deployment_are_named(tmp_path: Path) -> None:
    config = tmp_path / "deployment.yaml"
    models = [
        {"path": f"nowhere/{name}", "names": [name], "agent_ports": [port]} for name, port in (("a", 1), ("b", 2))
    ]
    config.write_text(yaml.safe_dump({"models": models, "limits": {"max_connections": 10**9}}))
    findings = doctor.examine(str(config), AscendHost(tmp_path, tmp_path))["deployment"]
    assert [one.found.split(":")[0] for one in found(findings, "deployment")] == ["models[0].path", "models[1].path"]
    unlimited = resource.getrlimit(resource.RLIMIT_NOFILE)[1] == resource.RLIM_INFINITY
    assert level_of(findings, "open files") == ("ok" if unlimited else "warning")
    config.write_text("models: []\nmodel: 1\n")
    assert (
        level_of(doctor.examine(str(config), AscendHost(tmp_path, tmp_path))["deployment"], "configuration") == "error"
    )


def test_what_is_wrong_for_every_device_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_DEVICES, "0, 1")
    config = tmp_path / "deployment.yaml"
    model = {"path": "x", "names": ["a"], "agent_ports": [1, 2], "target": "ascend"}
    config.write_text(yaml.safe_dump({"models": [model]}))
    findings = doctor.examine(str(config), AscendHost(tmp_path, tmp_path))["deployment"]
    assert len([one for one in findings if VISIBLE_DEVICES in one.found]) == 1


def test_a_deployment_for_devices_needs_one(tmp_path: Path) -> None:
    config = tmp_path / "deployment.yaml"
    config.write_text(
        yaml.safe_dump({"models": [{"path": "x", "names": ["a"], "agent_ports": [1], "target": "ascend"}]})
    )
    [finding] = doctor.examine(str(config), AscendHost(tmp_path, tmp_path))["ascend"]
    assert (finding.check, finding.level) == ("devices", "error")


@pytest.mark.parametrize(
    ("answers", "chips", "states"),
    [
        (
            fake_npu_smi.ATLAS_A2,
            [(0, 0, 0, "Ascend 910B3"), (1, 0, 1, "Ascend 910B3")],
            [("OK", 64 * GIB, int(64 * GIB * 0.95)), ("Alarm", 64 * GIB, 64 * GIB)],
        ),
        (
            fake_npu_smi.ATLAS_A3,
            [(0, 0, 0, "Ascend910"), (0, 1, 1, "910C")],
            [("OK", 64 * GIB, 32 * GIB), ("Warning", 64 * GIB, 64 * GIB)],
        ),
        (
            fake_npu_smi.OLD,
            [(2, 0, 0, "unknown"), (5, 0, 1, "unknown")],
            [("OK", 8 * GIB, None), ("unknown", None, None)],
        ),
        (fake_npu_smi.BROKEN, [], []),
    ],
    ids=["A2", "A3", "old", "broken"],
)
def test_every_layout_is_read(
    answers: Answers, chips: list[Any], states: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, tmp_path, answers)
    there = npu_smi.chips()
    assert [(chip.npu_id, chip.chip_id, chip.logic_id, chip.name) for chip in there] == chips
    seen = [npu_smi.state(chip) for chip in there]
    assert [(one.health, one.memory_bytes, one.free_bytes) for one in seen] == states


@given(st.text(alphabet=st.sampled_from("0123456789 |:-\n\tNPUIDChipHealthMB()%OK")))
def test_whatever_is_printed_is_no_error(text: str) -> None:
    list(npu_smi.parse_map(text))
    list(npu_smi.parse_list(text))
    values = npu_smi.fields(text)
    npu_smi.health_of(values)
    npu_smi.memory_of(values)


def test_a_host_in_order_has_no_error(host: AscendHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = {**fake_npu_smi.ATLAS_A2, "info -t health -i 1 -c 0": fake_npu_smi.FIELD("Health Status", "OK")}
    with_devices(monkeypatch, tmp_path, healthy)
    findings = doctor.examine(None, host)["ascend"]
    assert doctor.worst(findings) == "ok", findings
    texts = {one.check: one.found for one in findings}
    assert texts["driver"] == "25.2.0"
    assert texts["firmware"] == "7.7.0.6.236"
    assert texts["cann"] == "8.5.0.2.220"
    assert texts["devices"] == "2: Ascend 910B3"


def test_each_trouble_of_a_host_is_named(host: AscendHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, tmp_path, fake_npu_smi.ATLAS_A2)
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0, 1")
    (host.root / "ascend-toolkit/latest/compiler/version.info").write_text("Version=7.0.1\n")
    (host.root / "firmware/version.info").write_text("Version=8.0.0.1.200\n")
    for name in ("davinci1", "hisi_hdc"):
        (host.device_files / name).unlink()
    findings = doctor.examine(None, host)["ascend"]
    for check in ("health", "cann", "firmware", "paths of CANN", "ASCEND_RT_VISIBLE_DEVICES", "device files"):
        assert level_of(findings, check) == "error", check
    assert all(one.advice for one in findings if one.level != "ok")


def test_a_driver_that_names_no_device_is_an_error(
    host: AscendHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, tmp_path, fake_npu_smi.BROKEN)
    findings = doctor.examine(None, host)["ascend"]
    assert level_of(findings, "devices") == "error"
    assert not found(findings, "health")


@pytest.mark.parametrize(
    ("cache", "devices", "check", "level"),
    [
        ("1GiB", [0], "memory for the models", "ok"),
        ("62GiB", [1], "memory for the models", "ok"),
        ("62GiB", [0], "memory for the models", "error"),  # a twentieth of it is in use
        ("62GiB", [1, 0], "memory for the models", "error"),
        ("1GiB", [0, 2], "devices for the models", "error"),
    ],
)
def test_models_must_fit_into_the_devices(
    cache: str,
    devices: list[int],
    check: str,
    level: str,
    host: AscendHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_devices(monkeypatch, tmp_path, fake_npu_smi.ATLAS_A2)
    config = tmp_path / "deployment.yaml"
    model = {
        "path": "config/standin", "names": ["a"], "agent_ports": [9901 + device for device in devices],
        "target": "ascend", "cache_memory": cache, "devices": devices,
    }  # fmt: skip
    config.write_text(yaml.safe_dump({"models": [model]}))
    assert level_of(doctor.examine(str(config), host)["ascend"], check) == level


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A model of 6 GiB for two ranks, as far as its files tell."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for rank in range(2):
        with (folder / f"rank_{rank}.bin").open("wb") as file:
            file.truncate(3 * GIB)
    files = {f"rank_{rank}.bin": "" for rank in range(2)}
    manifest = msgspec.structs.replace(read_manifest("config/standin"), target="ascend", world_size=2, files=files)
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize(
    ("target", "free", "level", "words"),
    [
        ("ascend", 64 * GIB, "ok", "about 0.8 GiB of this host's, and 12.0 GiB more while agents load"),
        ("ascend", 8 * GIB, "warning", "about 12.8 GiB needed while all agents load at once, 8.0 GiB free"),
        ("ascend", GIB // 2, "error", "0.8 GiB needed, 0.5 GiB free"),
        ("cpu", 64 * GIB, "ok", "about 8.8 GiB of this host's"),
        ("cpu", 8 * GIB, "error", "8.8 GiB needed, 8.0 GiB free"),
    ],
)
def test_the_host_has_memory_for_what_runs_and_what_passes_through(
    target: str, free: int, level: str, words: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_host, "free_memory", lambda: free)
    config = tmp_path / "deployment.yaml"
    model = {"path": str(exported), "names": ["a"], "agent_ports": [9901, 9902], "target": target}
    config.write_text(yaml.safe_dump({"models": [model]}))
    found = doctor_host.memory(load(config))
    assert (found.level, found.found) == (level, words)


def test_the_weights_of_a_pair_are_in_both_of_its_files(exported: Path, tmp_path: Path) -> None:
    pair = read_manifest(lite_pairs.write_pair(tmp_path / "pair")).pair
    write_manifest(exported, msgspec.structs.replace(read_manifest(exported), pair=pair))
    config = tmp_path / "deployment.yaml"
    model = {"path": str(exported), "names": ["a"], "agent_ports": [9901, 9902], "target": "ascend"}
    config.write_text(yaml.safe_dump({"models": [model]}))
    [need] = needs(load(config))
    assert need.loading_bytes == 3 * GIB
    assert need.rank_bytes == 3 * GIB // 2 + GIB + RUNTIME_BYTES


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("GLOG_v", "3", "ok"),
        ("GLOG_v", "0", "warning"),
        ("GLOG_v", "verbose", "error"),
        ("HCCL_CONNECT_TIMEOUT", "60", "error"),
        ("HCCL_IF_IP", "eth0", "error"),
        ("HCCL_BUFFSIZE", "0", "error"),
        ("MS_ENABLE_LCCL", "yes", "error"),
        ("MS_SIMULATION_LEVEL", "0", "error"),
        ("RANK_SIZE", "2", "warning"),
        ("RANK_TABLE_FILE", "/nowhere.json", "error"),
    ],
)
def test_variables_are_checked(name: str, value: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    findings = list(doctor_environment.everywhere())
    assert doctor.worst(findings) == level
    assert level == "ok" or any(name in one.check + one.found and one.advice for one in findings)


@pytest.mark.parametrize("value", ["0, 1", "0,1,", "1,0", "1,1", "all", "0,7", ""])
def test_lists_of_devices_that_cann_would_misread(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_DEVICES, value)
    assert doctor.worst(doctor_environment.listed_devices([0, 1, 2, 3])) == "error"


@pytest.mark.parametrize(("value", "count"), [(None, 3), ("5", 1), ("0,1,2,3", 3), ("0, 1", 3)])
def test_an_acceptance_takes_the_devices_that_processes_may_use(
    value: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(VISIBLE_DEVICES, value)
    assert len(doctor_environment.shown([4, 5, 6])) == count


def table(**changes: Any) -> dict[str, Any]:
    devices = [{"device_id": str(i), "device_ip": f"192.1.0.{i}", "rank_id": str(i)} for i in range(2)]
    server = {"server_id": "10.0.0.1", "device": devices, "host_nic_ip": "reserve"}
    return {"version": "1.0", "server_count": "1", "server_list": [server], "status": "completed", **changes}


def changed(**changes: str | int) -> dict[str, Any]:
    """A table whose second device is different."""
    whole = table()
    whole["server_list"][0]["device"][1].update(changes)
    return whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (table(), None),
        ([], "no JSON object"),
        (table(version="2.0"), "version"),
        (table(status="initializing"), "has not finished"),
        (table(server_list=[]), "lists no servers"),
        (table(server_list=["10.0.0.1"]), "lists no servers"),
        (table(server_list=[{"server_id": "10.0.0.1", "device": None}]), "lists no devices"),
        (table(server_count="2"), "server_count"),
        (changed(rank_id=1), "every value is a string"),
        (changed(rank_id="0"), "each once"),
        (changed(device_id="0"), "listed twice"),
        (changed(device_ip="eth0"), "is no address"),
    ],
)
def test_rank_tables(content: object, words: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(content))
    wrong = " ".join(rank_table.problems(path))
    assert (words in wrong) if words else not wrong
    path.write_text("{")
    assert "is not JSON" in " ".join(rank_table.problems(path))


def test_versions_against_the_table() -> None:
    assert judged("cann", "8.5.0.2.220", "").level == "ok"
    assert judged("cann", "8.1.RC1", "").level == "error"
    assert judged("numpy", "2.0.1", "").level == "error"
    assert judged("numpy", None, "").level == "error"
    assert judged("python", "3.13.0", "").level == "error"
    assert lite(None).level == lite("2.7.1").level == "ok"
    assert lite("2.0.0").level == "warning"
    assert firmware_version("7.7.0.6.236", "[7.0.0,7.7.99]").level == "ok"
    assert firmware_version("8.0.0", "[7.0.0,7.7.99]").level == "error"
    assert firmware_version("7.7.0", "whatever").level == "ok"


@pytest.mark.parametrize(
    ("driver", "cann", "level"),
    [
        ("25.2.0", "8.5.0.2.220", "ok"),
        ("24.1.rc2", "8.5.0.2.220", "warning"),
        ("26.0.rc1", "8.5.0", "warning"),
        ("26.0.rc1", "8.5.2", "ok"),
        ("25.0.rc1.1", "9.0.0", "ok"),
        ("25.0.rc1.1", "9.1.0", "warning"),
        ("23.0.0", "8.5.1", "ok"),  # nobody has said which drivers these are for
        ("23.0.0", "8.2.RC1", "ok"),
        ("23.0.0", None, "ok"),
        (None, "8.5.0", "error"),
    ],
)
def test_a_driver_is_held_against_the_notes_of_cann(driver: str | None, cann: str | None, level: str) -> None:
    finding = driver_version(driver, cann)
    assert finding.level == level
    assert level != "warning" or "release notes of CANN" in finding.found


def test_drivers_are_known_of_supported_releases_only() -> None:
    assert {release(cann) for cann in DRIVERS} <= set(SUPPORTED["cann"].releases)


def test_the_table_is_that_of_its_sources() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert f'"mindspore=={SUPPORTED["mindspore"].releases[0]}.' in setup
    assert f'"numpy>={SUPPORTED["numpy"].releases[0]},<2"' in setup
    lowest, above = re.findall(r'python_requires=">=3\.(\d+),<3\.(\d+)"', setup)[0]
    assert SUPPORTED["python"].releases == tuple(f"3.{minor}" for minor in range(int(lowest), int(above)))
    checks = Path(sys.prefix).glob("lib/python*/site-packages/mindspore/run_check/_check_version.py")
    source = next(checks).read_text()
    accepted = re.findall(r"class AscendEnvChecker.*?self\.version = \[(.*?)\]", source, re.S)[0]
    assert SUPPORTED["cann"].releases == tuple(re.findall(r"[\d.]+", accepted))
