"""Mistakes in a deployment's file: each is an error that names its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.serving_config import ConfigError, load, parse_size

STANDIN = "models: [{path: x, names: [a], agent_ports: [9], target: standin%s}]"
LITE = "models: [{path: x, names: [a], agent_ports: [8, 9], target: ascend, runtime: mindspore_lite, %s}]"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("server: {port: 1, host: localhost, port: 2}", "port: given twice, the second time in line 1"),
        (f"limits: {{}}\n{STANDIN % ''}\nlimits: {{}}", "limits: given twice, the second time in line 3"),
        (STANDIN % ", cache_dtype: float32", r"models\[0\].cache_dtype: the stand-in"),
        (STANDIN % ", data_parallel: 2", r"models\[0\].agent_ports: 1 ports do not make 2 groups"),
        (STANDIN % ", devices: [0]", r"models\[0\].devices: only models with target ascend"),
        (STANDIN.replace("standin", "cpu") % ", devices: [0]", r"models\[0\].devices: only models with target ascend"),
        (
            STANDIN.replace("standin", "ascend") % ", devices: []",
            r"models\[0\].devices: 0 devices are not one for each of 1",
        ),
        (STANDIN.replace("standin", "ascend") % ", devices: [-1]", r"models\[0\].devices"),
        (STANDIN % ", device_start: 1", r"models\[0\].device_start: only models with target ascend"),
        (
            STANDIN.replace("standin", "ascend") % ", devices: [1], device_start: 1",
            r"models\[0\].device_start: devices are listed already; leave one of the two out",
        ),
        (
            STANDIN.replace("standin", "ascend").replace("[9]", "[8, 9]") % ", devices: [3, 3]",
            r"models\[0\].devices: device 3 has an agent of models\[0\] already",
        ),
        (
            "models: [{path: x, names: [a], agent_ports: [8], target: ascend}, "
            "{path: x, names: [b], agent_ports: [9], target: ascend}]",
            r"models\[1\].devices: device 0 has an agent of models\[0\] already; choose others",
        ),
        (STANDIN % ", threads: 2", r"models\[0\].threads: the stand-in"),
        (
            STANDIN % ", runtime: mindspore_lite",
            r"models\[0\].runtime: mindspore_lite runs models for target ascend only",
        ),
        (STANDIN % ", prefill_ini: a.ini", r"models\[0\].prefill_ini: only with runtime mindspore_lite"),
        (STANDIN % ", decode_rows: [0]", r"models\[0\].decode_rows\[0\]: Expected `int` >= 1"),
        (
            LITE % "decode_rows: [1], decode_ini: a.ini",
            r"models\[0\].decode_rows: the gears stand in decode_ini already",
        ),
        (
            LITE % "rank_table: a.json, data_parallel: 2",
            r"models\[0\].rank_table: is of one group; serve each of the 2",
        ),
        (STANDIN % ", step_seconds: .inf", r"models\[0\].step_seconds: needs a finite"),
        (STANDIN % ", step_seconds: .nan", r"models\[0\].step_seconds: "),
        (
            STANDIN % ", standin_faults: {a: burn}",
            r"models\[0\].standin_faults: .*'burn'; one of raise, crash, hang, differ",
        ),
        (STANDIN % ", standin_faults: {'': hang}", r"models\[0\].standin_faults: an empty text"),
        (STANDIN.replace("standin", "cpu") % ", standin_faults: {a: hang}", r"models\[0\].standin_faults: only the"),
        (STANDIN % ", cache_memory: auto", r"models\[0\].cache_memory: auto is for target ascend; write a size"),
        (STANDIN % f", cache_memory: {'9' * 400}GB", r"models\[0\].cache_memory: .* is not a size"),
        (STANDIN % "" + "\nserver: {drain_seconds: .inf}", "server.drain_seconds: needs a finite"),
        (STANDIN % "" + "\nlimits: {max_queue_seconds: .inf}", "limits.max_queue_seconds: needs a finite"),
        (STANDIN % "" + "\nlimits: {step_seconds: .nan}", "limits.step_seconds: "),
        (STANDIN % "" + "\nserver: {drain_seconds: .nan}", "server.drain_seconds: "),
        (STANDIN.replace("standin", "gpu") % "", r"models\[0\].target: .*'gpu'; one of cpu, ascend, standin"),
        (STANDIN % "" + "\nlogging: {level: loud}", "logging.level: .*'loud'; one of debug, info, warning, error"),
        (STANDIN % "" + "\nserver: {receive_timeout_seconds: .inf}", "server.receive_timeout_seconds: needs a finite"),
        (STANDIN % "" + "\nserver: {receive_timeout_seconds: 0}", "server.receive_timeout_seconds: "),
        (
            STANDIN % "" + "\nserver: {cors_origins: ['https://test/']}",
            "server.cors_origins: 'https://test/' is no origin",
        ),
        (STANDIN % "" + "\nlogging: {format: xml}", "logging.format: .*'xml'; one of text, json"),
        (STANDIN % "" + "\nlogging: {file_size: big}", "logging.file_size: 'big' is not a size"),
        (STANDIN % "" + "\nlogging: {file_size: 0B}", "logging.file_size: must be more"),
        (STANDIN % "" + "\nmetrics: {prefix: 'my-'}", "metrics.prefix: 'my-' cannot begin a Prometheus name"),
        (STANDIN % "" + "\nmetrics: {prefx: a}", "metrics.prefx: unknown key, did you mean prefix"),
        (STANDIN % "" + "\nserver: {prot: 1}", "server.prot: unknown key, did you mean port"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"deployment.yaml: {problem}"):
        load(path)


def test_ports_of_groups(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(STANDIN.replace("[9]", "[1, 2, 3, 4]") % ", data_parallel: 2")
    config = load(path)
    assert config.models[0].groups == ((1, 2), (3, 4))
    assert config.state_path(config.models[0], group=1).name == "agents-3.state"


def test_sizes() -> None:
    assert parse_size("512MiB") == 512 << 20
    assert parse_size("1.5 GB") == 1_500_000_000
    assert parse_size("999999999999999TiB") == 999_999_999_999_999 << 40
