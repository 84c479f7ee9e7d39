"""An export holds one weight at a time: more layers need no more memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from zero_checkpoint import export_memory, write_zeros

from kernels import library
from models.network_config import NetworkConfig

pytestmark = pytest.mark.slow

NARROW = NetworkConfig(
    architecture="llama",
    num_layers=2,
    hidden_size=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=4096,
    vocab_size=1000,
    context_length=512,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
NATIVE = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler: there are no C++ operators")


@pytest.mark.parametrize(
    "options",
    [
        ("--target", "ascend", "--tp", "2"),
        pytest.param(("--operators", "native", "--weights", "bfloat16", "--tp", "2"), marks=NATIVE),
        pytest.param(("--operators", "native", "--weights", "float32"), marks=NATIVE),
        ("--operators", "portable", "--weights", "float32"),
    ],
    ids=" ".join,
)
def test_memory_does_not_grow_with_the_layers(options: tuple[str, ...]) -> None:
    memory, weights = [], []
    for layers in (2, 14):
        with TemporaryDirectory() as folder:
            checkpoint, output = Path(folder) / "checkpoint", Path(folder) / "exported"
            write_zeros(replace(NARROW, num_layers=layers), checkpoint)
            memory.append(export_memory(checkpoint, output, *options))
            weights.append(next(output.rglob("weights.bin")).stat().st_size)
    assert memory[1] - memory[0] < (weights[1] - weights[0]) / 2  # of one rank
