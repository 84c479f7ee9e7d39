"""Checkpoints of any size that take no room: their weights are zeros. And what exporting one takes of memory."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
from tiny_checkpoints import write_json, write_text_files

from models.network_config import NetworkConfig
from models.weight_map import Floats, huggingface_weight_map

ROOT = Path(__file__).parent.parent


class Zeros:
    """A checkpoint (``WeightSource``) of zeros, which take no memory before they are copied."""

    source = "zeros"

    def __init__(self, config: NetworkConfig) -> None:
        self.config = config
        self._shapes = config.weight_shapes()

    def read(self, name: str) -> Floats:
        return np.zeros(self._shapes[name], np.float32)

    def block_kind(self, name: str) -> None:
        """Numbers, not blocks."""

    def read_blocks(self, name: str) -> None:
        """None."""


def export_memory(checkpoint: Path, output: Path, *options: str) -> int:
    """The most bytes that ``python -m models.export`` had in memory."""
    command = [sys.executable, "-m", "models.export", str(checkpoint), "--output", str(output), *options]
    process = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)})
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
