"""Run one rank of an exported model: a prefill and a decode MindIR on one set of weights and one paged KV cache.

The cache belongs to the runner: two tensors that both graphs take as inputs, so its size and dtype are chosen here,
from a memory budget, and nothing is copied between the phases. Where the graphs leave writing to the host (manifest:
``cache_write``) the runner writes each step's new keys and values through the slot mapping.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.np_dtype import bfloat16

from agent import collective
from agent.cache_probe import LOGIT_TOLERANCE, prove_sharing
from agent.compiled_graph import CompiledGraph, as_tensor, open_peers, placeholders, share_weights
from agent.logits import Logits
from agent.placement import physical_cores
from agent.protocol import Floats, Ints
from agent.runner import RunnerBroken, first_line
from agent.step_batch import StepBatch
from agent.step_parts import cached_columns, fits_one_call, parts_of
from config.manifest import Manifest, ManifestError, read_manifest, verify_rank
from kernels import library
from models import mindir

logger = logging.getLogger(__name__)

ROUNDED_TOLERANCE = 5e-2  # of the start-up proof where activations are rounded, as they are for packed weights


class ModelRunner:
    """One rank of a model on the CPU, ready to run when constructed."""

    def __init__(self, folder: Path, rank: int = 0, *, cache_bytes: int, cache_dtype: str, threads: int | None) -> None:
        """Load, share, prove. Of a model with several ranks, all of them do that together.

        Args:
            folder: what ``models.export`` wrote.
            rank: of the model's ranks.
            cache_bytes: memory for keys and values.
            cache_dtype: a ``config.serving_config.CacheDtype``.
            threads: of operators; None takes one for each physical core.

        Raises:
            ManifestError: the folder holds no model that this machine can run with such a cache, or the cache budget
                holds no block.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.manifest.check_cache_dtype(cache_dtype)
        self.cache_dtype = cache_dtype
        self.num_blocks = cache_blocks(self.manifest, cache_bytes, cache_dtype)
        if self.manifest.target != "cpu":
            raise ManifestError(f"{folder}: was exported for {self.manifest.target}; this agent runs models for cpu")
        own = verify_rank(folder, self.manifest, rank)
        threads = threads or physical_cores()
        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        if self.manifest.world_size > 1:
            collective.join(self.manifest.target)
        self._library = open_library(threads) if self.manifest.cache_write == "graph" else None
        prefill, decode = load_graphs(own, self.manifest, self._library, cache_dtype)
        share_weights(prefill, decode)
        self._peers = open_peers(own, self.manifest, rank)
        self._prefill, self._decode = CompiledGraph(prefill), CompiledGraph(decode)
        m = self.manifest
        shape = (m.num_layers * self.num_blocks, m.block_size, m.cache_heads, m.cache_width(cache_dtype))
        numbers = bfloat16 if cache_dtype == "bfloat16" else cache_dtype
        try:
            self._key_cache, self._value_cache = (np.zeros(shape, dtype=numbers) for _ in range(2))
        except MemoryError:
            raise ManifestError(f"cache_memory: this machine does not give {cache_bytes} bytes; choose less") from None
        # Tensors on the arrays' own memory: what a graph or the host writes, both see
        self._caches = [Tensor.from_numpy(self._key_cache), Tensor.from_numpy(self._value_cache)]
        rounded = 0.0 if m.weights == "float32" else ROUNDED_TOLERANCE
        prove_sharing(
            self,
            max(LOGIT_TOLERANCE[cache_dtype], rounded),
            otherwise="prefill and decode do not share their cache and weights",
            advice="export the model again",
        )

    def copy_blocks(self, copies: Ints) -> None:
        """Copy the keys and values of blocks in all layers, from and to ``[C, 2]``."""
        for cache in (self._key_cache, self._value_cache):
            by_block = cache.reshape(self.manifest.num_layers, self.num_blocks, *cache.shape[1:])
            by_block[:, copies[:, 1]] = by_block[:, copies[:, 0]]

    def agree(self, digest: bytes) -> None:
        """See that all ranks are about to run the same step, which ``digest`` stands for.

        Raises:
            RunnerBroken: they are not.
        """
        if self._peers:
            self._peers.agree(digest)

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """Run the model on new tokens and write their keys and values: the logits of the L wanted positions.

        ``best_only``: one rank of several returns ``Candidates``.

        Raises:
            RunnerBroken: an operator failed; MindSpore runs a graph no more after that.
        """
        own = self._run(batch)
        return self._peers.complete(own, best_only=best_only) if self._peers else own

    def _run(self, batch: StepBatch) -> Logits:
        """The logits of this rank's tokens."""
        if self._library or fits_one_call(batch, self.manifest.block_size):
            return self._call(batch)
        logits: Floats | None = None
        for part, positions in parts_of(batch, self.manifest.block_size):
            values = self._call(part).values
            if logits is None:
                logits = np.empty((batch.logits_indices.size, values.shape[1]), dtype=np.float32)
            logits[positions] = values
        assert logits is not None, "a step has rows"
        return Logits.of(logits)

    def _call(self, batch: StepBatch) -> Logits:
        """One call: of the decode graph if every row has one token, else of the prefill graph."""
        wanted = batch.logits_indices if batch.logits_indices.size else np.zeros(1, dtype=np.int32)
        decode = batch.query_lens.size == batch.token_ids.size
        tables = batch.block_tables if self._library else cached_columns(batch, self.manifest.block_size)
        numbers = (batch.token_ids, batch.positions, batch.slot_mapping, tables, batch.query_lens, batch.context_lens)
        inputs = [as_tensor(array) for array in (*numbers, wanted)]
        try:
            outputs = (self._decode if decode else self._prefill)(*inputs, *self._caches)
            arrays = [output.asnumpy() for output in outputs]
        except RuntimeError as error:
            reason = self._library.last_error() if self._library else ""
            raise RunnerBroken(reason or first_line(error)) from error
        if self._library:
            return Logits(*arrays)[: batch.logits_indices.size]
        self._write_cache(batch.slot_mapping, arrays[1:])
        return Logits.of(arrays[0])[: batch.logits_indices.size]

    def _write_cache(self, slots: Ints, fresh: Sequence[Floats]) -> None:
        """Write every layer's new keys and values, ``[layers, T, K, D]`` each; negative slots are padding."""
        m = self.manifest
        keep = slots >= 0
        for cache, new in zip((self._key_cache, self._value_cache), fresh, strict=True):
            by_slot = cache.reshape(m.num_layers, self.num_blocks * m.block_size, m.cache_heads, m.head_dim)
            by_slot[:, slots[keep]] = new[:, keep]


def cache_blocks(manifest: Manifest, cache_bytes: int, cache_dtype: str) -> int:
    """How many blocks the budget holds, the null block included.

    Raises:
        ManifestError: not even one beside the null block and one for the start-up proof.
    """
    block_bytes = manifest.cache_block_bytes(cache_dtype)
    blocks = cache_bytes // block_bytes
    if blocks < 3:
        raise ManifestError(f"cache_memory: {cache_bytes} bytes hold {blocks} blocks; give at least {3 * block_bytes}")
    return blocks


def open_library(threads: int) -> library.Library:
    """The C++ operators, built for this machine if they are not yet.

    Raises:
        ManifestError: they cannot be built; the model can be exported without them.
    """
    try:
        opened = library.Library(library.build())
    except library.BuildError as error:
        raise ManifestError(
            f"the model was exported with C++ operators: {error}; export it with --operators portable"
        ) from None
    opened.set_threads(threads)
    if (tiles := opened.tiles()) in (library.Tiles.REFUSED, library.Tiles.WRONG):
        logger.warning("%s", library.TILES[tiles])
    return opened


def load_graphs(
    folder: Path, manifest: Manifest, operators: library.Library | None, cache_dtype: str
) -> tuple[nn.GraphCell, nn.GraphCell]:
    """Prefill and decode graph, compiled once each for all shapes.

    The files name no folder; loaded are copies whose C++ operators come from this machine's library. MindSpore wants
    the weights in the copies' own folder and follows no symbolic link out of it.
    """
    graphs = []
    with tempfile.TemporaryDirectory(prefix=".loading-", dir=folder if os.access(folder, os.W_OK) else None) as scratch:
        mindir.link_or_copy(folder / mindir.WEIGHTS_FILE, Path(scratch) / mindir.WEIGHTS_FILE)
        for phase in ("prefill", "decode"):
            copy = Path(scratch) / f"{phase}.mindir"
            mindir.attach(folder / copy.name, copy, operators.file if operators else None)
            graph = nn.GraphCell(ms.load(str(copy)))
            graph.set_inputs(*placeholders(manifest, cache_dtype))  # without this each new shape is compiled anew
            graphs.append(graph)
    return graphs[0], graphs[1]
