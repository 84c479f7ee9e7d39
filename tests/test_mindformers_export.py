"""The graphs that an installed MindFormers writes; where it is not installed, one sentence says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import write_tiny

from models import mindir
from models.checkpoint import CheckpointError, open_checkpoint
from models.mindformers_export import llama_config, main
from models.weight_map import mindformers_weight_map

ROOT = Path(__file__).resolve().parent.parent
installed = importlib.util.find_spec("mindformers") is not None


@pytest.mark.skipif(installed, reason="MindFormers is installed")
def test_without_mindformers_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "pair")]) == 1
    assert "MindFormers is not installed" in capsys.readouterr().err
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(("family", "method"), [("llama", None), ("llama-linear", "PI"), ("llama3", "LLAMA3")])
def test_arguments_of_llama(family: str, method: str | None, tmp_path: Path) -> None:
    write_tiny(family, tmp_path)
    arguments = llama_config(open_checkpoint(tmp_path).config, "bfloat16", 16, 32)
    assert arguments.get("extend_method") == method
    assert (arguments["n_kv_heads"], arguments["intermediate_size"], arguments["compute_dtype"]) == (2, 96, "bfloat16")


def test_a_network_that_is_no_llama_of_mindformers(tmp_path: Path) -> None:
    write_tiny("qwen3", tmp_path)
    with pytest.raises(CheckpointError, match="qwen3's shape is not one of MindFormers' Llama"):
        llama_config(open_checkpoint(tmp_path).config, "float16", 16, 32)


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="MindFormers is not installed")
@pytest.mark.parametrize("family", ["llama3", "internlm", "qwen2"])
def test_a_pair_has_the_checkpoints_weights(family: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path / "tiny")
    command = [sys.executable, "-m", "models.mindformers_export", str(tmp_path / "tiny"), "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "pair"), "--blocks", "8"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(tmp_path / "tiny")
    operators = {"prefill": "FlashAttentionScore", "decode": "PagedAttention"}
    for graph, operator in operators.items():
        model = mindir.read(tmp_path / "pair" / f"{graph}.mindir")
        names = [tensor.name for tensor in mindir.inputs(model)]
        assert names == ["tokens", "batch_valid_length", "block_tables", "slot_mapping"]
        assert any(operator in node.op_type for node in model.graph.node)
        stored = {mindir.plain_name(parameter.name): parameter for parameter in model.graph.parameter}
        for weight, pieces in mindformers_weight_map(checkpoint.config, (), "stacked").items():
            kinds = [
                np.float32 if len(stored[p.tensor].raw_data) == 4 * np.prod(p.shape) else np.float16 for p in pieces
            ]
            parts = [
                np.frombuffer(stored[piece.tensor].raw_data, kind).reshape(piece.shape)
                for piece, kind in zip(pieces, kinds, strict=True)
            ]
            np.testing.assert_allclose(np.concatenate(parts), checkpoint.read(weight), atol=2e-3, err_msg=weight)
