"""Models of seven billion parameters, two layers of them at full width, are exported for Ascend rank by rank.

Of several ranks it is the last one, which has fewer tokens and what is filled up with zeros. The weights are zeros.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ascend_contract import assert_contract, assert_operators, collectives, export_rank, operators
from zero_checkpoint import Zeros, export_memory, write_zeros

from config.manifest import read_manifest
from models import ascend, mindir
from models.network_config import NetworkConfig

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
        assert export_memory(checkpoint, output, "--target", "ascend", "--tp", "2") < MAX_MEMORY
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
