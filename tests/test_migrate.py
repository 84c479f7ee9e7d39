"""Configurations of the older system, translated: what is loaded, what is said of the rest."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from lite_pairs import write_ranks, write_tokenizer

from agent import preflight
from config import migrate
from config.free_ports import free_ports
from config.old_config import flat
from config.serving_config import ConfigError, load

# As the older system's samples are, for a paged model on one device.
OLD = """
model_path:
    prefill_model: ["/models/llama/prefill/rank_0_graph.mindir"]
    decode_model: ["/models/llama/decode/rank_0_graph.mindir"]
    argmax_model: "/models/llama/argmax.mindir"
    topk_model: "/models/llama/topk.mindir"
    prefill_ini: ["/models/llama/prefill.ini"]
    decode_ini: ["/models/llama/decode.ini"]
    post_model_ini: "/models/llama/post.ini"
model_config:
    model_name: 'llama_7b'
    max_generate_length: 2048
    end_token: 2
    seq_length: [1024, 4096]
    vocab_size: 32000
    prefill_batch_size: [1]
    decode_batch_size: [4, 16]
    zactivate_len: [512, 1024, 2048, 4096]
    model_type: 'dyn'
    seq_type: 'static'
    batch_waiting_time: 0.0
    decode_batch_waiting_time: 0.0
    batching_strategy: 'continuous'
    current_index: False
    page_attention: True
    model_dtype: "DataType.FLOAT32"
    pad_token_id: 0
    backend: 'ge'
serving_config:
    agent_ports: [16002]
    start_device_id: 2
    server_ip: '127.0.0.1'
    server_port: 8835
pa_config:
    num_blocks: 512
    block_size: 16
    decode_seq_length: 4096
tokenizer:
    type: LlamaTokenizer
    vocab_file: '/models/llama/tokenizer.model'
basic_inputs:
    type: LlamaBasicInputs
extra_inputs:
    type: LlamaExtraInputs
warmup_inputs:
    type: LlamaWarmupInputs
"""


def old(**sections: dict[str, Any]) -> dict[str, Any]:
    """The old file with some keys set; None takes one out."""
    content: dict[str, Any] = yaml.safe_load(OLD)
    for section, changes in sections.items():
        content[section] = {**content.get(section, {}), **changes}
    return content


def test_an_old_file_becomes_a_deployment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "old.yaml", tmp_path / "new.yaml"
    source.write_text(OLD, encoding="utf-8")
    assert migrate.main([str(source), "--output", str(target)]) == 0
    config = load(target)
    [model] = config.models
    assert (model.path, model.names) == ("output/models/llama_7b", ("llama2", "internlm", "llama_7b"))
    assert (model.agent_ports, model.device_ids, model.target) == ((16002,), (2,), "ascend")
    assert (model.runtime, model.rank_table) == ("mindspore_lite", None)
    assert (model.prefill_ini, model.decode_ini) == ("/models/llama/prefill.ini", "/models/llama/decode.ini")
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8835)
    limits = config.limits
    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_new_tokens) == (16, 4096, 2048)
    said = capsys.readouterr().out
    assert (
        "1. Make the model folder: python -m models.adopt /models/llama/prefill/rank_0_graph.mindir "
        "/models/llama/decode/rank_0_graph.mindir --tokenizer /models/llama --output output/models/llama_7b "
        "--context-length 4096 "
    ) in said
    assert "unknown" not in said
    written = target.read_text(encoding="utf-8")
    for line in said.splitlines():
        assert f"# {line}\n" in written


def test_every_key_is_translated_dropped_with_a_reason_or_named() -> None:
    content = old(model_config={"temperature_mode": "hot"}, cache_engine={"gpu": {"blocks": 3}})
    done = migrate.migrate(content)
    assert done.unknown == ("model_config.temperature_mode", "cache_engine.gpu.blocks")
    translated = {
        "model_path.prefill_model",
        "model_path.decode_model",
        "model_path.prefill_ini",
        "model_path.decode_ini",
        "model_config.backend",
        "model_config.model_name",
        "model_config.max_generate_length",
        "model_config.seq_length",
        "model_config.decode_batch_size",
        "serving_config.agent_ports",
        "serving_config.start_device_id",
        "serving_config.server_ip",
        "serving_config.server_port",
        "pa_config.decode_seq_length",
        "tokenizer.vocab_file",
    }
    assert {key for key, _ in flat(content)} == translated | done.dropped.keys() | set(done.unknown)
    assert not translated & done.dropped.keys()


def test_an_app_that_was_open_to_everyone_asks_for_keys() -> None:
    done = migrate.migrate(old(serving_config={"server_ip": "0.0.0.0"}))
    assert done.deployment["server"] == {
        "host": "0.0.0.0",
        "port": 8835,
        "allow_remote": True,
        "api_key_file": "output/api-keys.txt",
    }
    assert "set server.allow_without_key: true" in done.steps[-1]
    migrate.check(done.text("old.yaml"))


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        (
            {"serving_config": {"agent_ports": [1, 2]}},
            "Export the checkpoint: python -m models.export CHECKPOINT --target ascend --tp 2 --output "
            "output/models/llama_7b (1 prefill and 1 decode files are not a pair for each of 2 rank(s))",
        ),
        (
            {"model_path": {"prefill_model": None}, "model_config": {"model_cfg_path": "/m/predict.yaml"}},
            "Export the checkpoint of /m/predict.yaml: python -m models.export",
        ),
        ({"tokenizer": {"vocab_file": "/my files/t.model"}}, "--tokenizer '/my files' --output"),
    ],
    ids=["two ranks", "live cells", "a path with a space"],
)
def test_what_is_left_to_do_is_said(changes: dict[str, dict[str, Any]], step: str) -> None:
    assert step in migrate.migrate(old(**changes)).steps[0]


def of_ranks(backend: str, ranks: int = 2) -> dict[str, Any]:
    """The old file of a model with a pair of files for each of several ranks."""
    return old(
        model_path={
            f"{phase}_model": [f"/m/{phase}/rank_{rank}_graph.mindir" for rank in range(ranks)]
            for phase in ("prefill", "decode")
        },
        model_config={"backend": backend},
        serving_config={"agent_ports": [16002 + rank for rank in range(ranks)]},
    )


def test_pairs_of_several_ranks_are_adopted_in_their_order() -> None:
    done = migrate.migrate(of_ranks("ge"))
    assert "models.adopt --rank /m/prefill/rank_0_graph.mindir /m/decode/rank_0_graph.mindir --rank " in done.steps[0]
    assert (
        "--target ascend --tp 2 --output output/models/llama_7b, set cache_memory: auto, cache_dtype: bfloat16 and "
        in (done.steps[0])
    )
    assert "take out runtime, prefill_ini, decode_ini, rank_table" in done.steps[0]
    assert "at output/rank_table.json, or write its path into models.rank_table" in done.steps[1]
    [model] = done.deployment["models"]
    assert (model["runtime"], model["rank_table"]) == ("mindspore_lite", "output/rank_table.json")
    migrate.check(done.text("old.yaml"))


def test_what_ran_kernel_by_kernel_runs_with_mindspore() -> None:
    done = migrate.migrate(old(model_config={"backend": "kbk"}))
    [model] = done.deployment["models"]
    assert not set(migrate.OF_LITE) & model.keys()
    assert "models.adopt /models/llama/prefill/rank_0_graph.mindir" in done.steps[0]
    assert "take out" not in done.steps[0]
    for key in ("model_path.prefill_ini", "model_path.decode_ini", "model_config.backend"):
        assert "MindSpore" in done.dropped[key]
    ranks = migrate.migrate(of_ranks("kbk"))
    assert "--tp 2" in ranks.steps[0]
    assert "for MindSpore Lite only, and this file has backend: kbk" in ranks.steps[0]
    assert not set(migrate.OF_LITE) & ranks.deployment["models"][0].keys()


def test_files_of_the_time_before_kbk_are_of_ge_and_a_paged_graph_has_one_ini() -> None:
    content = old(model_path={"decode_ini": ["/models/llama/512.ini", "/models/llama/1024.ini"]})
    del content["model_config"]["backend"]
    done = migrate.migrate(content)
    [model] = done.deployment["models"]
    assert (model["runtime"], model["prefill_ini"]) == ("mindspore_lite", "/models/llama/prefill.ini")
    assert "decode_ini" not in model
    assert "one file for each zactivate_len" in done.dropped["model_path.decode_ini"]


PREFILL_INI = (
    "[ge_graph_options]\nge.inputShape=batch_valid_length:1;slot_mapping:-1;tokens:1,-1\nge.dynamicDims=64,64;128,128\n"
)
DECODE_INI = (
    "[ge_graph_options]\nge.inputShape=batch_valid_length:-1;block_tables:-1,8;slot_mapping:-1;tokens:-1,1\n"
    "ge.dynamicDims=1,1,1,1;4,4,4,4\n"
)


def test_what_is_left_to_do_makes_a_deployment_that_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, from their old file to a deployment without a problem, by the steps as they are said."""
    from models import adopt  # here: it takes MindSpore, and seconds

    monkeypatch.chdir(tmp_path)
    prefill, decode = zip(*write_ranks(tmp_path / "old"), strict=True)
    (tmp_path / "prefill.ini").write_text(PREFILL_INI)
    (tmp_path / "decode.ini").write_text(DECODE_INI)
    write_tokenizer(tmp_path / "tokenizer")
    content = old(
        model_path={
            "prefill_model": list(map(str, prefill)),
            "decode_model": list(map(str, decode)),
            "prefill_ini": ["prefill.ini"],
            "decode_ini": ["decode.ini"],
        },
        model_config={"seq_length": [64, 128], "decode_batch_size": [1, 4]},
        serving_config={"agent_ports": free_ports(2)},
        pa_config={"decode_seq_length": 128},
        tokenizer={"vocab_file": "tokenizer/tokenizer.model"},
    )
    Path("old.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert migrate.main(["old.yaml", "--output", "new.yaml"]) == 0
    [command] = re.findall(
        r"^# 1\. Make the model folder: python -m models\.adopt (.*) \(it says", Path("new.yaml").read_text(), re.M
    )
    assert adopt.main(shlex.split(command)) == 0
    assert list(preflight.problems(load("new.yaml"))) == ["models[0].rank_table: output/rank_table.json: no such file"]
    Path("output/rank_table.json").write_text("{}")
    assert list(preflight.problems(load("new.yaml"))) == []


def test_what_is_exported_anew_has_the_cache_of_an_export() -> None:
    done = migrate.migrate(old(serving_config={"agent_ports": [16002, 16003]}))
    [model] = done.deployment["models"]
    assert (model["device_start"], model["cache_memory"], model["cache_dtype"]) == (2, "auto", "bfloat16")
    assert done.unknown == ()
    migrate.check(done.text("old.yaml"))


def test_little_is_enough() -> None:
    done = migrate.migrate({"serving_config": {"agent_ports": 16002}, "model_config": None})
    assert done.deployment["models"][0]["names"] == ["llama2", "internlm", "model"]
    assert "limits" not in done.deployment
    migrate.check(done.text("old.yaml"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: []", "is no configuration of the older system"),
        ("serving_config: {agent_ports: [x]}", "serving_config.agent_ports: 'x' is no whole number"),
        ("serving_config: {agent_ports: []}", "serving_config.agent_ports: lists no port"),
        ("serving_config: {agent_ports: [70000]}", "cannot be translated: models[0].agent_ports"),
        ("model_config: {model_name: [a]}", "model_config.model_name: ['a'] is no text"),
        ("model_config: {a: 1}\nmodel_config: {b: 1}", "model_config: given twice"),
        ("model_config: !!python/object/apply:os.mkdir [made]", "is not YAML: could not determine a constructor"),
        (None, "cannot be read: No such file"),
    ],
    ids=["another file", "no number", "no port", "a wrong port", "no text", "twice", "code", "no file"],
)
def test_what_cannot_be_translated_is_said(
    text: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if text:
        Path("old.yaml").write_text(text, encoding="utf-8")
    assert migrate.main(["old.yaml", "--output", "new.yaml"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("migrate: old.yaml: ")
    assert problem in said
    assert [path.name for path in tmp_path.iterdir()] == (["old.yaml"] if text else [])


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "old.yaml", tmp_path / "new.yaml"
    source.write_text(OLD, encoding="utf-8")
    target.write_text("mine", encoding="utf-8")
    assert migrate.main([str(source), "--output", str(target)]) == 1
    assert f"{target}: File exists" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == "mine"


def test_a_key_cannot_break_out_of_the_comments() -> None:
    done = migrate.migrate(old(model_config={"a\nmodels: []\n#": 1}))
    assert yaml.safe_load(done.text("old\n.yaml")) == done.deployment
    with pytest.raises(ConfigError, match=r"models\[0\]\.agent_ports"):
        migrate.check(migrate.migrate(old(serving_config={"agent_ports": [0]})).text("old.yaml"))
