"""A model as it was published: opened, checked, and read one weight at a time.

``open_checkpoint`` knows the formats; everything behind it is of one format, everything in front of it is of none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import gguf

from config.manifest import file_digest
from models.checkpoint_error import CheckpointError
from models.gguf_config import ROPE_FREQS, gguf_config
from models.gguf_file import GGUFFile
from models.gguf_tokenizer import gguf_text
from models.huggingface_config import CONFIG_FILE, ConfigFile, huggingface_config
from models.huggingface_text import TEXT_FILES, huggingface_text
from models.mindformers_config import (
    YAML_SUFFIXES,
    MindFormersFile,
    find_mindformers_file,
    fused_rows,
    mindformers_config,
)
from models.mindformers_text import mindformers_text
from models.mindspore_checkpoint import CKPT, MindSporeCheckpoint
from models.network_config import NetworkConfig
from models.safetensors_folder import PICKLES, SafetensorsFolder
from models.text_files import TextFiles
from models.weight_map import (
    Blocks,
    Floats,
    TensorSource,
    WeightMap,
    block_kind,
    check_tensors,
    gguf_weight_map,
    huggingface_weight_map,
    mindformers_fused,
    mindformers_weight_map,
    read_blocks,
    read_weight,
)
from models.weight_names import MINDFORMERS_EMBEDDING

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint", "source_digest"]

FORMATS = (
    "a .gguf file, a folder with one, a Hugging Face folder (config.json and *.safetensors), or a MindFormers folder "
    "(its YAML file, and *.ckpt or *.safetensors)"
)
GGUF_MAGIC = b"GGUF"
RANK_FOLDER = "rank_"  # how the folders of a distributed MindFormers checkpoint begin


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One published model. Weights are read when asked for, straight from the memory-mapped files."""

    source: str  # the file's or folder's name
    name: str  # the same without its ending
    config: NetworkConfig
    text: TextFiles
    tensors: TensorSource
    weights: WeightMap

    def read(self, name: str) -> Floats:
        """The weight ``name`` of ``config.weight_shapes()``: float32, C-contiguous, in memory of its own."""
        return read_weight(self.tensors, self.weights[name])

    def block_kind(self, name: str) -> gguf.GGMLQuantizationType | None:
        """The kind of blocks that the file stores it in, if that is one and operators can read them."""
        return block_kind(self.tensors, self.weights[name])

    def read_blocks(self, name: str) -> Blocks | None:
        """The same weight as the file stores it, if that is in such blocks."""
        return read_blocks(self.tensors, self.weights[name])


def source_digest(path: Path) -> str:
    """SHA-256 that stands for a checkpoint's content: the file's own, or that of all read files' names and digests.

    Quick beside ``open_checkpoint``: a GGUF file's tokenizer alone takes seconds to parse.

    Raises:
        CheckpointError: there is nothing.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: does not exist; expected {FORMATS}")
    kinds, names = (".gguf", ".safetensors", CKPT, *YAML_SUFFIXES), (CONFIG_FILE, *TEXT_FILES)
    everything = (*path.iterdir(), *path.glob(f"{RANK_FOLDER}0/*"))
    files = sorted(file for file in everything if file.suffix in kinds or file.name in names)
    listing = "".join(f"{file_digest(file)}  {file.relative_to(path)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model and see that it can be served, without reading its weights yet.

    Raises:
        CheckpointError: there is nothing, its format or architecture is not supported, or it is incomplete.
    """
    try:
        return _open(Path(path))
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a field that no sound file has in that form
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: a configuration or tokenizer file in it is damaged: {reason}") from error


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist; expected {FORMATS}")
    if any(path.match(pattern) for pattern in PICKLES):
        raise CheckpointError(
            f"{path}: PyTorch's pickle files can run any code when they are opened and are never read; "
            f"expected {FORMATS}"
        )
    if path.suffix == CKPT:
        raise CheckpointError(f"{path}: says nothing of its network; give a folder with it and its YAML file")
    with path.open("rb") as file:
        start = file.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise CheckpointError(f"{path}: starts with {start!r}, which is no GGUF file; expected {FORMATS}")
    return _open_gguf(path)


def _open_folder(folder: Path) -> Checkpoint:
    gguf_files = sorted(folder.glob("*.gguf"))
    has_config = (folder / CONFIG_FILE).is_file()
    has_safetensors = any(folder.glob("*.safetensors"))
    may_be_mindformers = not (has_config or gguf_files) or _has_mindformers_weights(folder)
    if may_be_mindformers and (described := find_mindformers_file(folder)) is not None:
        return _open_mindformers(folder, described)
    if gguf_files and not (has_config and has_safetensors):
        if len(gguf_files) > 1:
            names = ", ".join(path.name for path in gguf_files)
            raise CheckpointError(f"{folder}: holds {len(gguf_files)} GGUF files ({names}); give the path of one")
        return _open_gguf(gguf_files[0])
    if gguf_files:
        raise CheckpointError(
            f"{folder}: holds both safetensors and GGUF files; give the path of the GGUF file to use it"
        )
    if not has_config:
        raise CheckpointError(f"{folder}: has no {CONFIG_FILE} and no GGUF file; expected {FORMATS}")
    return _open_huggingface(folder)


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = gguf_config(file)
    _check_heads(path, config)
    weights = gguf_weight_map(config)
    check_tensors(path, file, weights, unused=lambda name: name == ROPE_FREQS)
    text = gguf_text(file, config.vocab_size)
    return Checkpoint(source=path.name, name=path.stem, config=config, text=text, tensors=file, weights=weights)


def _open_huggingface(folder: Path) -> Checkpoint:
    file = ConfigFile(folder / CONFIG_FILE)
    config = huggingface_config(file)
    _check_heads(folder, config)
    tensors = SafetensorsFolder(folder)
    weights = huggingface_weight_map(config)
    check_tensors(folder, tensors, weights, unused=lambda name: _recomputed(name, config))
    text = huggingface_text(folder, file, config.vocab_size)
    name = folder.resolve().name
    return Checkpoint(source=name, name=name, config=config, text=text, tensors=tensors, weights=weights)


def _has_mindformers_weights(folder: Path) -> bool:
    """Whether a folder that has another format's files holds MindFormers' weights, by their file or tensor names."""
    if any(folder.glob(f"*{CKPT}")):
        return True
    return any(folder.glob("*.safetensors")) and MINDFORMERS_EMBEDDING in SafetensorsFolder(folder).shapes


def _open_mindformers(folder: Path, file: MindFormersFile) -> Checkpoint:
    config = mindformers_config(file)
    _check_heads(file.path, config)
    tensors = _mindformers_tensors(folder)
    rows = fused_rows(file) if mindformers_fused(tensors.shapes) else "stacked"
    weights = mindformers_weight_map(config, tensors.shapes, rows)
    check_tensors(folder, tensors, weights, unused=lambda name: _recomputed(name, config) or _beside_network(name))
    text = mindformers_text(folder, file, config.vocab_size)
    name = folder.resolve().name
    return Checkpoint(source=name, name=name, config=config, text=text, tensors=tensors, weights=weights)


def _mindformers_tensors(folder: Path) -> TensorSource:
    """The weights in a folder, or in its ``rank_0`` if that is the only rank."""
    has_safetensors, has_ckpt = any(folder.glob("*.safetensors")), any(folder.glob(f"*{CKPT}"))
    if has_safetensors and has_ckpt:
        raise CheckpointError(f"{folder}: holds both safetensors and {CKPT} files; leave those to serve in it")
    if has_safetensors:
        return SafetensorsFolder(folder)
    if has_ckpt:
        return MindSporeCheckpoint(folder)
    ranks = sorted(path for path in folder.glob(f"{RANK_FOLDER}*") if path.is_dir())
    if len(ranks) == 1:
        return _mindformers_tensors(ranks[0])
    if ranks:
        raise CheckpointError(
            f"{folder}: holds the slices of {len(ranks)} ranks; make whole tensors of them first, with MindFormers' "
            "transform_ckpt.py or MindSpore's unified_safetensors, and put those in their place"
        )
    raise CheckpointError(f"{folder}: has no {CKPT} and no safetensors files with its weights")


def _beside_network(name: str) -> bool:
    """An optimizer's state, a training's counters, and caches, which MindFormers saves together with a network."""
    return not name.startswith(("model.", "lm_head.")) or ".paged_attention_mgr." in name or ".kvcache_mgr." in name


def _check_heads(path: Path, config: NetworkConfig) -> None:
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{path}: has {config.num_heads} heads of {config.head_dim} for {config.num_kv_heads} keys and values; "
            "the second must be even, the third must divide the first"
        )


def _recomputed(name: str, config: NetworkConfig) -> bool:
    """Tensors that say nothing new: old releases' rotary frequencies, and a head that is the embedding once more."""
    return name.endswith(".rotary_emb.inv_freq") or (
        config.tied_embeddings and name in ("lm_head.weight", "output.weight")
    )
