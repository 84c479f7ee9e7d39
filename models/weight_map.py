"""Where each weight of a network is stored: its tensors' names, shapes and row orders in each format.

A weight of ``NetworkConfig.weight_shapes()`` is one or more pieces, stacked along their rows. What a format stores in
another order than ours is put in order piece by piece, so only one weight is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.weight_names import (
    GGUF_NAMES,
    HUGGINGFACE_NAMES,
    INTERNLM2_NAMES,
    MINDFORMERS_EMBEDDING,
    MINDFORMERS_FUSED,
    MINDFORMERS_NAMES,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Rows = NDArray[Any]  # of numbers, or of the bytes of their blocks
Weights = Callable[[str], Any]  # MindSpore's Parameter of a weight by its name, or None if the network has none


# How the rows of several weights in one stand: one weight after the other, or by key/value head (gate and up: by row).
FusedRows = Literal["stacked", "grouped"]


class RowOrder(Protocol):
    """Puts the rows of a weight with this many heads into our order."""

    def __call__(self, rows: Rows, heads: int) -> Rows: ...


@dataclass(frozen=True)
class Blocks:
    """A tensor in blocks of 32 numbers as GGUF stores them: uint8 ``[N, bytes of a row]``."""

    kind: gguf.GGMLQuantizationType  # Q4_0, Q4_1, Q8_0 or BF16
    rows: Bytes


class TensorSource(Protocol):
    """The stored tensors of one checkpoint, by the names of its format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every stored tensor's shape, rows first."""

    def read(self, name: str) -> Floats:
        """One tensor as float32 in memory of its own."""

    def block_kind(self, name: str) -> gguf.GGMLQuantizationType | None:
        """The kind of blocks that one tensor is stored in, if operators can read them."""

    def read_blocks(self, name: str) -> Blocks | None:
        """One tensor as it is stored, if that is in such blocks."""


class WeightSource(Protocol):
    """The weights of a network, by the names of ``NetworkConfig.weight_shapes``: a checkpoint's, or a rank's part."""

    @property
    def source(self) -> str:
        """The checkpoint's file or folder name, for errors."""

    @property
    def config(self) -> NetworkConfig: ...

    def read(self, name: str) -> Floats:
        """One weight: float32, C-contiguous, in memory of its own."""

    def block_kind(self, name: str) -> gguf.GGMLQuantizationType | None:
        """The kind of blocks that the file stores it in, if that is one and operators can read them."""

    def read_blocks(self, name: str) -> Blocks | None:
        """The same weight as the file stores it, if that is in such blocks."""


@dataclass(frozen=True)
class Piece:
    """One stored tensor that is a weight, or some rows of one."""

    tensor: str
    shape: tuple[int, ...]
    arrange: Callable[[Rows], Rows] | None = None  # its rows into our order


WeightMap = dict[str, tuple[Piece, ...]]


def gguf_weight_map(config: NetworkConfig) -> WeightMap:
    """The weights of a GGUF file. Converters put the rotary pairs of Llama and InternLM2 side by side, not Qwen's."""
    paired = config.architecture in ("llama", "internlm2")
    return _weight_map(config, GGUF_NAMES, rotary=_halves_from_pairs if paired else None)


def huggingface_weight_map(config: NetworkConfig) -> WeightMap:
    """The weights of a Hugging Face folder."""
    names = INTERNLM2_NAMES if config.architecture == "internlm2" else HUGGINGFACE_NAMES
    return _weight_map(config, names, fused={"qkv": partial(_unpack_groups, config=config)})


def mindformers_fused(stored: Collection[str]) -> dict[str, str]:
    """Those of a MindFormers checkpoint's tensors that are several weights in one: their names by their roles."""
    return {role: name for role, name in MINDFORMERS_FUSED if f"{name.format(0)}.weight" in stored}


def mindformers_weight_map(config: NetworkConfig, stored: Collection[str], rows: FusedRows) -> WeightMap:
    """The weights of a MindFormers checkpoint with the tensors ``stored``, whose fused ones have these ``rows``."""
    # What qkv_concat_hf2mg and ffn_concat_hf2mg of mindformers/utils/convert_utils.py do, undone
    grouped = {"qkv": partial(_unpack_groups, config=config), "gate_up": partial(_halves_from_pairs, heads=1)}
    names = MINDFORMERS_NAMES | mindformers_fused(stored)
    weights = _weight_map(config, names, fused=grouped if rows == "grouped" else {})
    (embedding,) = weights["embed_tokens"]
    return weights | {"embed_tokens": (replace(embedding, tensor=MINDFORMERS_EMBEDDING),)}


def _weight_map(
    config: NetworkConfig,
    names: dict[str, str],
    *,
    rotary: RowOrder | None = None,
    fused: Mapping[str, Callable[[Rows], Rows]] | None = None,
) -> WeightMap:
    """``rotary`` puts the rows of q and of k in order, ``fused`` those of tensors that are several weights, by role."""
    weights = {}
    for weight, shape in config.weight_shapes().items():
        layer, role = _split(weight)
        suffix = ".bias" if role.endswith("_bias") else ".weight"
        pieces = _pieces(config, names, role.removesuffix("_bias"), shape, rotary, fused or {})
        weights[weight] = tuple(replace(piece, tensor=piece.tensor.format(layer) + suffix) for piece in pieces)
    return weights


def _split(weight: str) -> tuple[str, str]:
    """``layers.3.qkv`` → ``3``, ``qkv``; ``norm`` → nothing, ``norm``."""
    if not weight.startswith("layers."):
        return "", weight
    _, layer, kind = weight.split(".")
    return layer, kind


def _pieces(
    config: NetworkConfig,
    names: dict[str, str],
    role: str,
    shape: tuple[int, ...],
    rotary: RowOrder | None,
    fused: Mapping[str, Callable[[Rows], Rows]],
) -> Iterator[Piece]:
    """The pieces of one weight, with their names still to be completed by layer and suffix."""
    if role in names:
        yield Piece(names[role], shape, fused.get(role))
    elif role == "gate_up":
        half = (config.intermediate_size, *shape[1:])
        yield from (Piece(names["gate"], half), Piece(names["up"], half))
    else:
        for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            arrange = None if rotary is None or part == "v" else partial(rotary, heads=heads)
            yield Piece(names[part], (heads * config.head_dim, *shape[1:]), arrange)


def _halves_from_pairs(rows: Rows, heads: int) -> Rows:
    """Rotary partners from rows ``2i, 2i + 1`` of a head to rows ``i, i + d/2``; undoes llama.cpp's ``permute``."""
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, d/2, 2, …]
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _unpack_groups(rows: Rows, config: NetworkConfig) -> Rows:
    """For each key/value head its query heads, the key and the value (InternLM2's ``wqkv``) → all q, all k, all v."""
    group = config.num_heads // config.num_kv_heads
    packed = rows.reshape(config.num_kv_heads, group + 2, config.head_dim, *rows.shape[1:])
    parts = packed[:, :group], packed[:, group], packed[:, group + 1]
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


def of_layer(weights: Weights, index: int) -> Weights:
    """The weights of one layer, by the names that they have in each."""
    return lambda name: weights(f"layers.{index}.{name}")


def read_weight(tensors: TensorSource, pieces: tuple[Piece, ...]) -> Floats:
    """One weight, C-contiguous, in memory of its own."""
    weight: Floats = _stacked(pieces, [tensors.read(piece.tensor) for piece in pieces])
    return weight


def block_kind(tensors: TensorSource, pieces: tuple[Piece, ...]) -> gguf.GGMLQuantizationType | None:
    """The kind of blocks that all tensors of one weight are stored in; None if there is none that they share."""
    kinds = {tensors.block_kind(piece.tensor) for piece in pieces}
    return kinds.pop() if len(kinds) == 1 else None


def read_blocks(tensors: TensorSource, pieces: tuple[Piece, ...]) -> Blocks | None:
    """One weight as it is stored; None unless all its tensors are in blocks of one kind."""
    kind = block_kind(tensors, pieces)
    if kind is None:
        return None
    stored = [tensors.read_blocks(piece.tensor) for piece in pieces]
    return Blocks(kind, _stacked(pieces, [part.rows for part in stored if part is not None]))


def _stacked(pieces: tuple[Piece, ...], parts: list[Rows]) -> Rows:
    arranged = [
        part if piece.arrange is None else piece.arrange(part) for piece, part in zip(pieces, parts, strict=True)
    ]
    return np.ascontiguousarray(arranged[0] if len(arranged) == 1 else np.concatenate(arranged))


def check_tensors(source: Path, tensors: TensorSource, weights: WeightMap, unused: Callable[[str], bool]) -> None:
    """See that the checkpoint holds exactly the tensors of this network, before anything is read.

    ``unused`` tells which other tensors carry nothing that the network lacks.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is one that this network has no place for.
    """
    needed = {piece.tensor: piece.shape for pieces in weights.values() for piece in pieces}
    stored = tensors.shapes
    missing = [name for name in needed if name not in stored]
    if missing:
        raise CheckpointError(f"{source}: lacks {_listed(missing)}, which this architecture needs")
    for name, shape in needed.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(stored[name])}, its configuration says {list(shape)}"
            )
    extra = [name for name in stored if name not in needed and not unused(name)]
    if extra:
        raise CheckpointError(
            f"{source}: holds {_listed(extra)}, which this architecture does not use; "
            "the model is not the one that its configuration describes"
        )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more tensors"
