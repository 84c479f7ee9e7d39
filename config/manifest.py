"""The manifest of an exported model: the one source of its shapes and rules.

``models.export`` writes it beside the MindIR; agents and server read it, so the server never reads ``models``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from config.serving_config import Target, WeightFormat

MANIFEST_VERSION = 5
MANIFEST_FILE = "manifest.json"
LOGITS_RUN = 64  # neighbouring logits of which a graph tells the largest; kernels/linear.cc knows this number too
CACHE_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int32": 4}  # the last: the stand-in's
SCALE_BYTES = 4  # of int8, behind each token's numbers of a head: the float32 that they are to be multiplied by
HOST_CACHE_DTYPES = ("float32", "float16")  # what standard operators can take


class ManifestError(ValueError):
    """The folder holds no usable exported model; the message says what is wrong and what to do."""


class GraphTensor(msgspec.Struct, frozen=True):
    """One input or output of a graph; -1 is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TokenizerRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the server must know of a model's text side beside ``tokenizer.json`` and ``chat_template.jinja``."""

    bos_token_id: int | None
    add_bos: bool  # a prompt starts with bos_token_id unless it has it already
    eos_token_ids: tuple[int, ...]  # each of them ends an answer


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What one call of the graphs can hold."""

    cached_context: bool = True  # prompt rows whose first tokens are in the cache already (chunks)
    mixed_steps: bool = True  # prompt rows and decoding rows together
    max_num_batched_tokens: int | None = None  # tokens; None: what the configuration allows
    prompt_logits: bool = True  # of any position of a prompt; else of its last one only


class PagedGraph(msgspec.Struct, frozen=True, kw_only=True):
    """One graph of a pair that another exporter wrote."""

    file: str  # beside the manifest
    inputs: tuple[GraphTensor, ...]  # in feed order, named by what they are for
    names: tuple[str, ...]  # of these inputs in the file


class PagedPair(msgspec.Struct, frozen=True, kw_only=True):
    """A pair that was adopted: its graphs hold the cache themselves, so its size and type are theirs."""

    prefill: PagedGraph
    decode: PagedGraph
    num_blocks: int  # of the cache, the null block included
    cache_dtype: str
    padding_slot: Literal[-1, 0]  # what a padded token is given for its slot


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An exported model, with all its ranks."""

    version: int = MANIFEST_VERSION
    name: str
    architecture: str
    target: Target
    source: str  # the checkpoint's file or folder name
    source_digest: str  # with export_digest: the export is reused while both match
    export_digest: str = ""
    world_size: int = 1  # ranks of tensor parallelism
    weights: WeightFormat | Literal["none"] = "float32"  # none: the stand-in, and adopted pairs, which have their own
    num_layers: int
    num_heads: int
    num_kv_heads: int
    cache_heads: int  # of them, or of copies and zeros in their place, in each rank's cache
    head_dim: int
    vocab_size: int
    context_length: int
    block_size: int
    cache_write: Literal["graph", "host"]  # who writes new keys and values into the cache
    capabilities: Capabilities = Capabilities()
    tokenizer: TokenizerRules
    pair: PagedPair | None = None  # None: exported by this project
    inputs: tuple[GraphTensor, ...] = ()  # the same for prefill and decode, in feed order
    outputs: tuple[GraphTensor, ...] = ()
    files: dict[str, str] = {}  # path in the folder → SHA-256, of every file beside this one

    def cache_width(self, dtype: str) -> int:
        """The last axis of a cache of this dtype: a head's numbers and, in int8, their scale."""
        return self.head_dim + (SCALE_BYTES if dtype == "int8" else 0)

    def cache_block_bytes(self, dtype: str) -> int:
        """Bytes of keys and values that one block takes over all layers in one rank's cache of this dtype."""
        numbers = 2 * self.num_layers * self.block_size * self.cache_heads * self.cache_width(dtype)
        return numbers * CACHE_ITEM_BYTES[dtype]

    def check_cache_dtype(self, dtype: str) -> None:
        """See that the model runs with such a cache.

        Raises:
            ManifestError: it does not.
        """
        if self.pair and dtype != self.pair.cache_dtype:
            raise ManifestError(f"the graphs of {self.name} hold a cache of {self.pair.cache_dtype}, not {dtype}")
        if self.target == "ascend" and not self.pair and dtype != self.weights:
            raise ManifestError(f"{self.name} has a cache of its weights' dtype on Ascend: {self.weights}, not {dtype}")
        if self.cache_write == "host" and dtype not in HOST_CACHE_DTYPES:
            raise ManifestError(
                f"{self.name} was exported with standard operators, whose cache is {' or '.join(HOST_CACHE_DTYPES)}, "
                f"not {dtype}; export it with C++ operators, or choose one of these"
            )

    def check_weights(self, wanted: WeightFormat | None) -> None:
        """See that the model has the format of weights that the configuration wants.

        Raises:
            ManifestError: it has another.
        """
        if wanted is not None and self.pair:
            raise ManifestError(
                f"{self.name} was adopted and keeps the weights that its graphs have; leave this key out"
            )
        if wanted not in (None, self.weights):
            raise ManifestError(f"{self.name} has {self.weights}; export it with --weights {wanted}")

    def digest(self) -> str:
        """SHA-256 of all that it says, which every rank and the server must know alike: ``Hello.manifest_digest``."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def rank_tokens(vocab_size: int, world_size: int) -> int:
    """Tokens of each rank's embedding and head; the last rank may have fewer."""
    return -(-vocab_size // world_size)


def rank_folder(rank: int, world_size: int) -> str:
    """Where in an exported model's folder a rank's graphs are."""
    return f"rank_{rank}" if world_size > 1 else "."


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of an exported model.

    Raises:
        ManifestError: there is none, or it is not one that this version reads.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise ManifestError(
            f"{folder}: no exported model here (no {MANIFEST_FILE}); run python -m models.export"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}; export the model again") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != MANIFEST_VERSION:
        raise ManifestError(f"{path}: manifest version {version}, this release reads {MANIFEST_VERSION}; export again")
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{path}: {error}; export the model again") from None


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``folder``, readable by a person."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (Path(folder) / MANIFEST_FILE).write_bytes(text + b"\n")


def verify_files(folder: str | Path, manifest: Manifest, needed: Callable[[str], bool] = lambda name: True) -> None:
    """Check the files whose names are ``needed`` against their digests.

    Raises:
        ManifestError: a file is missing or is not the one that was exported.
    """
    for name, digest in manifest.files.items():
        if not needed(name):
            continue
        path = Path(folder) / name
        if not path.is_file():
            raise ManifestError(f"{path}: missing; export the model again")
        if file_digest(path) != digest:
            raise ManifestError(f"{path}: is not the file that was exported (SHA-256 differs); export the model again")


def verify_rank(folder: str | Path, manifest: Manifest, rank: int) -> Path:
    """Check the files that one rank loads, and no other rank's: the folder of its graphs.

    Raises:
        ManifestError: as of ``verify_files``.
    """
    own = rank_folder(rank, manifest.world_size)
    verify_files(folder, manifest, lambda name: not name.startswith("rank_") or name.startswith(f"{own}/"))
    return Path(folder) / own


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path there: ``Manifest.files``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
