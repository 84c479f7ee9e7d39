"""Run one rank of a model that was exported for Ascend: a graph for each kind of step on one set of weights and caches.

``AscendRunner`` knows of no device: it pads steps, feeds graphs in the order of the manifest and proves at its start
that they share their caches. ``open_ascend_runner`` puts it on an NPU. No NPU has run either; docs/ascend.md says how
far each part has been tried.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from agent import collective
from agent.cache_probe import prove_sharing
from agent.compiled_graph import CompiledGraph, as_tensor, open_peers, placeholders, share_weights
from agent.logits import Logits
from agent.model_runner import cache_blocks
from agent.peers import Peers
from agent.placement import Place
from agent.protocol import Ints
from agent.runner import RunnerBroken, first_line
from agent.step_batch import StepBatch
from agent.step_padding import Phase, blank_steps, doubled, grown, padded, phase_of
from config.manifest import GraphTensor, Manifest, ManifestError, read_manifest, verify_rank
from config.serving_config import LimitsConfig
from models import mindir

PHASES: tuple[Phase, ...] = ("prefill", "chunk", "decode")
TRIAL_BLOCKS = 3  # of the cache while steps are tried: the null block, and two for the proof
AUTO_SHARE = 0.9  # of the device's free memory that becomes cache if the configuration leaves it to us
TOLERANCE = 5e-2  # of the proof, relative to the largest logit: bfloat16 and float16 sums in another order

logger = logging.getLogger(__name__)

Graph = Callable[..., Any]  # tensors to a tensor or several


@dataclass(frozen=True)
class Graphs:
    """What one rank's exported files do."""

    steps: Mapping[Phase, Graph]  # of a step's inputs and all caches: logits
    read_blocks: Graph  # of blocks and all caches: their tokens, for each cache
    write_blocks: Graph  # of slots, such tokens and all caches


class AscendRunner:
    """One rank of a model, ready to run when constructed."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        graphs: Graphs,
        new_cache: Callable[[GraphTensor, int], Tensor],
        choose_blocks: Callable[[], int],
        limits: LimitsConfig,
        peers: Peers | None = None,
    ) -> None:
        """Run every size of step once, then make the caches and prove that all graphs share them.

        Args:
            folder: of the exported model.
            manifest: its manifest.
            graphs: this rank's.
            new_cache: a cache of one layer, as the manifest describes it, with so many blocks of zeros.
            choose_blocks: the number of blocks, asked when steps of all sizes have taken their memory.
            limits: of the steps to come.
            peers: the model's other ranks, if it has any.

        Raises:
            ManifestError: the memory holds no block, or the graphs do not share their caches.
        """
        self.folder = folder
        self.manifest = manifest
        self.cache_dtype = str(manifest.weights)
        self._graphs = graphs
        self._new_cache = new_cache
        self._peers = peers
        self._caches = self._caches_of(TRIAL_BLOCKS)
        self._warm_up(limits)
        self.num_blocks = choose_blocks()
        self._caches = self._caches_of(self.num_blocks)
        for phase, apart in (("decode", 1), ("chunk", 2)):
            wrong = (
                f"prefill and {phase} do not share their caches and weights, or an operator is not what it is taken for"
            )
            prove_sharing(self, TOLERANCE, otherwise=wrong, advice="see docs/ascend.md", phase=phase, apart=apart)

    def agree(self, digest: bytes) -> None:
        """``Runner.agree``."""
        if self._peers:
            self._peers.agree(digest)

    def copy_blocks(self, copies: Ints) -> None:
        """Copy the keys and values of blocks in all layers, from and to ``[C, 2]``; no block is copied from and to."""
        pairs = grown(copies, doubled(len(copies)), 2)  # the null block, to itself
        size = self.manifest.block_size
        slots = (pairs[:, 1:] * size + np.arange(size, dtype=np.int32)).reshape(-1)
        with breaking():
            tokens = self._graphs.read_blocks(as_tensor(pairs[:, 0]), *self._caches)
            self._graphs.write_blocks(as_tensor(slots), *tokens, *self._caches)

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """Run the model on new tokens and write their keys and values: the logits of the L wanted positions.

        ``best_only``: one rank of several returns ``Candidates``.

        Raises:
            RunnerBroken: an operator failed.
        """
        most_blocks = -(-self.manifest.context_length // self.manifest.block_size)
        return self._run(phase_of(batch), padded(batch, most_blocks), batch.logits_indices.size, best_only=best_only)

    def _run(self, phase: Phase, batch: StepBatch, wanted: int, *, best_only: bool = False) -> Logits:
        """Run one graph on a step of a padded size: the logits of its first ``wanted`` positions.

        Raises:
            RunnerBroken: an operator failed.
        """
        inputs = [as_tensor(array) for array in self._inputs_of(batch)]
        with breaking():
            logits = self._graphs.steps[phase](*inputs, *self._caches).asnumpy()
        own = Logits.of(np.ascontiguousarray(logits[:wanted]))
        return self._peers.complete(own, best_only=best_only) if self._peers else own

    def _inputs_of(self, batch: StepBatch) -> Iterator[Ints]:
        """A step's arrays in the order in which the graphs take them."""
        names = {"q_seq_lens": "query_lens", "batch_valid_length": "context_lens"}  # MindSpore's names, and ours
        for tensor in step_inputs(self.manifest):
            yield getattr(batch, names.get(tensor.name, tensor.name))

    def _caches_of(self, blocks: int) -> list[Tensor]:
        """Empty caches, one for each cache input of the graphs."""
        return [self._new_cache(tensor, blocks) for tensor in cache_inputs(self.manifest)]

    def _warm_up(self, limits: LimitsConfig) -> None:
        """Run each graph on all sizes that steps are padded to, and copy blocks in all numbers, in the null block."""
        for phase in PHASES:
            for step in blank_steps(phase, limits, self.manifest.context_length, self.manifest.block_size):
                self._run(phase, step, step.logits_indices.size)
        for power in range(doubled(min(limits.max_num_seqs, limits.max_num_batched_tokens)).bit_length()):
            self.copy_blocks(np.zeros((1 << power, 2), np.int32))
        logger.info("all sizes of steps have been run")


@contextlib.contextmanager
def breaking() -> Iterator[None]:
    """Where an operator may fail, at once or when its result is asked for.

    Raises:
        RunnerBroken: it did.
    """
    try:
        yield
    except RuntimeError as error:
        raise RunnerBroken(first_line(error)) from error


def step_inputs(manifest: Manifest) -> list[GraphTensor]:
    """The graphs' inputs that each step brings, in feed order."""
    return [tensor for tensor in manifest.inputs if "_cache_" not in tensor.name]


def cache_inputs(manifest: Manifest) -> list[GraphTensor]:
    """The graphs' other inputs: the caches of all layers, in feed order."""
    return [tensor for tensor in manifest.inputs if "_cache_" in tensor.name]


def open_ascend_runner(
    folder: Path, place: Place, *, cache_bytes: int | None, cache_dtype: str, limits: LimitsConfig
) -> AscendRunner:
    """The runner of one rank on its NPU. Of a model with several ranks, all of them do that together.

    Args:
        folder: what ``models.export`` wrote.
        place: the rank, and its device.
        cache_bytes: memory for keys and values; None takes most of what weights and steps leave.
        cache_dtype: a ``config.serving_config.CacheDtype``: that of the weights.
        limits: of the steps to come.

    Raises:
        ManifestError: there is no such NPU, the folder holds no model for it, or its memory no cache.
    """
    manifest = read_manifest(folder)
    if manifest.target != "ascend":
        raise ManifestError(f"{folder}: was exported for {manifest.target}, and this agent runs models for ascend")
    manifest.check_cache_dtype(cache_dtype)
    take_device(place.device)
    own = verify_rank(folder, manifest, place.rank)
    if manifest.world_size > 1:
        collective.join(manifest.target)
    graphs = load_graphs(own, manifest)

    def choose_blocks() -> int:
        return cache_blocks(manifest, auto_bytes(place.device) if cache_bytes is None else cache_bytes, cache_dtype)

    peers = open_peers(own, manifest, place.rank)
    return AscendRunner(folder, manifest, graphs, device_cache, choose_blocks, limits, peers)


def take_device(device: int) -> None:
    """Let this process run on an NPU, kernel by kernel: what dynamic shapes and the attention operators need.

    Raises:
        ManifestError: there is none.
    """
    if not ms.hal.is_available("Ascend"):
        raise ManifestError(
            f"target: ascend needs an Ascend NPU with driver and CANN, and MindSpore {ms.__version__} finds none here"
        )
    ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0", "infer_boost": "on"})
    ms.set_device("Ascend", device)


def load_graphs(folder: Path, manifest: Manifest) -> Graphs:
    """One rank's graphs, the weights of one after the other let go for those of the first."""
    steps: dict[Phase, Graph] = {}
    first: nn.GraphCell | None = None
    for phase in PHASES:
        graph = load_graph(folder / f"{phase}.mindir", placeholders(manifest, str(manifest.weights)))
        if first is None:
            first = graph
        else:
            share_weights(first, graph)
        steps[phase] = CompiledGraph(graph)
    one, caches = Tensor(shape=[None], dtype=ms.int32), placeholders_of_caches(manifest)
    tokens = [Tensor(shape=[None, cache.shape[2] * cache.shape[3]], dtype=cache.dtype) for cache in caches]
    read = load_graph(folder / "read_blocks.mindir", [one, *caches])
    write = load_graph(folder / "write_blocks.mindir", [one, *tokens, *caches])
    return Graphs(steps, CompiledGraph(read), CompiledGraph(write))


def placeholders_of_caches(manifest: Manifest) -> list[Tensor]:
    """The caches as ``placeholders`` describes them."""
    return placeholders(manifest, str(manifest.weights))[len(step_inputs(manifest)) :]


def load_graph(file: Path, inputs: list[Tensor]) -> nn.GraphCell:
    """A graph that is compiled once for all shapes.

    Raises:
        MindIRError: it has C++ operators: a library is code, and no graph for Ascend needs one.
    """
    if operators := mindir.custom_operators(mindir.read(file)):
        raise mindir.MindIRError(f"{file}: has operators of a library that is not ours: {', '.join(sorted(operators))}")
    graph = nn.GraphCell(ms.load(str(file)))
    graph.set_inputs(*inputs)
    return graph


def device_cache(tensor: GraphTensor, blocks: int) -> Tensor:
    """A cache in the device's memory."""
    return ops.zeros((blocks, *tensor.shape[1:]), getattr(ms, tensor.dtype))


def auto_bytes(device: int) -> int:
    """What of the device's free memory becomes cache if that is left to us.

    Raises:
        ManifestError: MindSpore does not say what is free.
    """
    free = int(ms.hal.get_device_properties(device, "Ascend").free_memory)
    if not free:
        raise ManifestError("cache_memory: auto: MindSpore does not say what memory the device has free; write a size")
    return int(free * AUTO_SHARE)
