"""Models of seven billion parameters, two layers of them at full width, are exported for Ascend rank by rank.

Of several ranks it is the last one, which has fewer tokens and what is filled up with zeros. The weights are zeros.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from ascend_contract import assert_contract, assert_operators, collectives, export_rank, operators
from tiny_checkpoints import write_json, write_text_files

from config.manifest import read_manifest
from models import ascend, mindir
from models.network_config import NetworkConfig
from models.weight_map import Blocks, Floats, huggingface_weight_map

ROOT = Path(__file__).parent.parent
MAX_MEMORY = 12 << 30  # bytes, of one export
HEADS = {"num_layers": 2, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
LLAMA = {"context_length": 4096, "norm_eps": 1e-5, "rope_theta": 10000.0, "intermediate_size": 11008}
WIDTHS = {
    "Llama-2-7B": NetworkConfig(architecture="llama", vocab_size=32000, **HEADS, **LLAMA),
    "InternLM-7B": NetworkConfig(
        architecture="internlm", vocab_size=103168, qkv_bias=True, output_bias=True, **HEADS, **LLAMA
    ),
    "Qwen2.5-7B": NetworkConfig(
        architecture="qwen2",
        num_layers=2,
        hidden_size=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        vocab_size=152064,
        context_length=32768,
        norm_eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
    ),
}


class Zeros:
    """A checkpoint (``WeightSource``) of zeros, which take no memory before they are copied."""

    source = "zeros"

    def __init__(self, config: NetworkConfig) -> None:
        self.config = config
        self._shapes = config.weight_shapes()

    def read(self, name: str) -> Floats:
        return np.zeros(self._shapes[name], np.float32)

    def read_blocks(self, name: str) -> Blocks | None:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", WIDTHS)
def test_a_rank_at_full_width_keeps_the_contract(model: str, ranks: int) -> None:
    with TemporaryDirectory() as folder:
        exported = export_rank(Zeros(WIDTHS[model]), Path(folder) / "rank", ranks - 1, ranks, "bfloat16")
        for phase in ascend.PHASES:
            assert_operators(exported, phase)
            assert_contract(exported, phase)


@pytest.mark.slow
def test_the_command_streams_a_checkpoint_within_its_memory() -> None:
    with TemporaryDirectory() as folder:
        checkpoint, output = Path(folder) / "checkpoint", Path(folder) / "exported"
        write_zeros(WIDTHS["Llama-2-7B"], checkpoint)
        assert export_memory(checkpoint, output) < MAX_MEMORY
        manifest = read_manifest(output)
        assert (manifest.target, manifest.weights, manifest.world_size, manifest.cache_heads) == (
            "ascend",
            "bfloat16",
            2,
            16,
        )
        gather = mindir.read(output / "rank_1" / "gather.mindir")
        assert operators(gather) == ["AllGather"]
        assert collectives(gather) == [("AllGather", "hccl_world_group")]
        weights = [(output / f"rank_{rank}" / "weights.bin").stat().st_size for rank in range(2)]
        assert weights[0] == weights[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers() -> None:
    narrow = replace(WIDTHS["Llama-2-7B"], vocab_size=1000, hidden_size=1024, num_heads=8, num_kv_heads=8)
    narrow = replace(narrow, intermediate_size=4096, context_length=512)
    memory, weights = [], []
    for layers in (2, 14):
        with TemporaryDirectory() as folder:
            checkpoint, output = Path(folder) / "checkpoint", Path(folder) / "exported"
            write_zeros(replace(narrow, num_layers=layers), checkpoint)
            memory.append(export_memory(checkpoint, output))
            weights.append((output / "rank_0" / "weights.bin").stat().st_size)
    assert memory[1] - memory[0] < (weights[1] - weights[0]) / 2  # of one rank


def export_memory(checkpoint: Path, output: Path) -> int:
    """The most bytes that the command had in memory while it exported for two ranks on Ascend."""
    command = [sys.executable, "-m", "models.export", str(checkpoint), "--target", "ascend", "--tp", "2"]
    process = os.posix_spawn(
        sys.executable, [*command, "--output", str(output)], {**os.environ, "PYTHONPATH": str(ROOT)}
    )
    _, status, usage = os.wait4(process, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


def write_zeros(config: NetworkConfig, folder: Path) -> None:
    """A Hugging Face folder of that shape whose weights are a hole in a file."""
    folder.mkdir()
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    write_json(folder / "config.json", content)
    write_text_files(folder)
    entries, end = {}, 0
    for piece in (piece for pieces in huggingface_weight_map(config).values() for piece in pieces):
        start, end = end, end + 2 * math.prod(piece.shape)
        entries[piece.tensor] = {"dtype": "BF16", "shape": piece.shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
