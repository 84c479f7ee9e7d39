"""A model as it was published: opened, checked, and read one weight at a time.

``open_checkpoint`` knows the formats; everything behind it is format-specific, everything in front of it is not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from config.manifest import file_digest
from models.checkpoint_error import CheckpointError
from models.gguf_config import ROPE_FREQS, gguf_config
from models.gguf_file import GGUFFile
from models.gguf_tokenizer import gguf_text
from models.network_config import NetworkConfig
from models.text_files import TextFiles
from models.weight_map import Floats, TensorSource, WeightMap, check_tensors, gguf_weight_map, read_weight

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

FORMATS = "a .gguf file, a folder with one, or a Hugging Face folder (config.json and *.safetensors)"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One published model. Weights are read when asked for, straight from the memory-mapped files."""

    name: str  # readable
    source: str  # the file's or folder's name
    config: NetworkConfig
    text: TextFiles
    files: tuple[Path, ...]  # everything that was or can be read
    tensors: TensorSource
    weights: WeightMap

    def read(self, name: str) -> Floats:
        """The weight ``name`` of ``config.weight_shapes()``: float32, C-contiguous, in memory of its own."""
        return read_weight(self.tensors, self.weights[name])

    def digest(self) -> str:
        """SHA-256 that stands for the content: of the file, or of all files' names and digests."""
        if len(self.files) == 1:
            return file_digest(self.files[0])
        listing = "".join(f"{file_digest(path)}  {path.name}\n" for path in sorted(self.files))
        return hashlib.sha256(listing.encode()).hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model and see that it can be served, without reading its weights yet.

    Raises:
        CheckpointError: there is nothing, its format or architecture is not supported, or it is incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; expected {FORMATS}")
    if path.is_file():
        return _open_gguf(path)
    raise CheckpointError(f"{path}: nothing to read here; expected {FORMATS}")


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = gguf_config(file)
    weights = gguf_weight_map(config)
    check_tensors(str(path), file, weights, unused=lambda name: name == ROPE_FREQS)
    return Checkpoint(
        name=path.stem,
        source=path.name,
        config=config,
        text=gguf_text(file),
        files=(path,),
        tensors=file,
        weights=weights,
    )
