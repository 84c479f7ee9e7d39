"""Run a pair of paged MindIR graphs that another exporter wrote and ``models.adopt`` made a model folder of.

Such graphs hold the cache as Parameters, so its size and type are theirs; the decode graph is given the prefill
graph's, and the weights with it. ``agent.paged_inputs`` makes their calls of a step. Block 0 is the null block here as
everywhere: rows that only fill a graph's fixed number read and write there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from agent.ascend_runner import take_device
from agent.cache_probe import LOGIT_TOLERANCE, prove_sharing
from agent.compiled_graph import CompiledGraph, placeholder, share_weights
from agent.logits import Logits
from agent.paged_inputs import CallLimits, PagedCall, Phase, Role, paged_calls
from agent.placement import physical_cores
from agent.protocol import Floats, Ints
from agent.runner import RunnerBroken, first_line
from agent.step_batch import PlanError, StepBatch
from config.manifest import GraphTensor, ManifestError, PagedGraph, read_manifest, verify_files


class PagedPairRunner:
    """One adopted pair, ready to run when constructed."""

    def __init__(self, folder: Path, *, device: int, cache_bytes: int, cache_dtype: str, threads: int | None) -> None:
        """Load, share, prove.

        Args:
            folder: what ``models.adopt`` wrote.
            device: the NPU, among those that this process sees; a CPU has only 0.
            cache_bytes: the most that keys and values may take.
            cache_dtype: of the cache that the graphs hold.
            threads: of operators on a CPU; None takes one for each physical core.

        Raises:
            ManifestError: the folder holds no pair that runs here, or their cache is another or larger.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        if self.manifest.pair is None:
            raise ManifestError(f"{folder}: holds no adopted pair")
        pair = self.manifest.pair
        self.manifest.check_cache_dtype(cache_dtype)
        self.cache_dtype = cache_dtype
        self.num_blocks = pair.num_blocks
        needed = pair.num_blocks * self.manifest.cache_block_bytes(cache_dtype)
        if cache_bytes < needed:
            raise ManifestError(f"cache_memory: the graphs hold a cache of {needed} bytes; give as many or more")
        verify_files(folder, self.manifest)
        if self.manifest.target == "ascend":
            take_device(device)
        else:
            take_cpu(threads or physical_cores())
        self._graphs: dict[Phase, PairGraph] = {
            "prefill": PairGraph(folder, pair.prefill),
            "decode": PairGraph(folder, pair.decode),
        }
        prefill, decode = self._graphs["prefill"], self._graphs["decode"]
        share_weights(prefill.cell, decode.cell)
        # Where a graph leaves it open, each prompt goes alone: some exporters want prompts one behind the other, others
        # side by side, and of one both are the same.
        self._limits = CallLimits(
            prompts=prefill.rows or 1,
            prompt_tokens=prefill.length or sys.maxsize,
            tokens=decode.rows or sys.maxsize,
            padding_slot=pair.padding_slot,
        )
        prove_sharing(
            self,
            LOGIT_TOLERANCE[cache_dtype],
            otherwise="its prefill and decode graph do not share their cache, or want another padding slot",
            advice="python -m models.adopt has --padding-slot",
        )

    def copy_blocks(self, copies: Ints) -> None:
        """Refused: without prompts on cached tokens no request takes over another's blocks.

        Raises:
            PlanError: always.
        """
        raise PlanError("block_copies: this model's graphs continue no prompt, so there is nothing to copy a block for")

    def agree(self, digest: bytes) -> None:
        """Nothing: a pair has one rank, which agrees with itself."""

    def run(self, batch: StepBatch, *, best_only: bool = False) -> Logits:
        """Run the model on new tokens and write their keys and values: the logits of the L wanted positions.

        They are whole even where ``best_only`` asks for less, since a pair has one rank.

        Raises:
            RunnerBroken: an operator failed; MindSpore runs a graph no more after that.
        """
        logits = np.empty((batch.logits_indices.size, self.manifest.vocab_size), dtype=np.float32)
        for call in paged_calls(batch, self._limits):
            logits[call.places] = self._call(call)[call.rows]
        return Logits.of(logits)

    def _call(self, call: PagedCall) -> Floats:
        """The logits of the last token of every row."""
        graph = self._graphs[call.phase]
        padded = graph.padded(call, self.manifest.block_size)
        try:
            return padded.last_logits(graph(padded), self.manifest.vocab_size)
        except RuntimeError as error:
            raise RunnerBroken(first_line(error)) from error


class PairGraph:
    """One graph of a pair.

    Attributes:
        cell: what MindSpore has loaded.
        rows, length: of a call, where the graph fixes them; 0: open.
    """

    def __init__(self, folder: Path, graph: PagedGraph) -> None:
        self._inputs = graph.inputs
        self.cell = nn.GraphCell(ms.load(str(folder / graph.file)))
        self.cell.set_inputs(*map(placeholder, graph.inputs))  # without this each new shape is compiled anew
        self._compiled = CompiledGraph(self.cell)
        shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
        self.rows, self.length = (max(0, size) for size in shapes["token_ids"])
        self._width = max(0, shapes.get("block_tables", (0, 0))[1])

    def padded(self, call: PagedCall, block_size: int) -> PagedCall:
        """The call in the graph's shape; what is open is as large as the call needs."""
        rows, length = call.token_ids.shape
        blocks = -(-int(call.valid_lengths.max()) // block_size)
        return call.padded(rows=self.rows or rows, length=self.length or length, width=self._width or blocks)

    def __call__(self, call: PagedCall) -> Floats:
        """Feed it, each input by what it is for: its first output, as float32."""
        outputs = self._compiled(*(feed(tensor, call.input(cast(Role, tensor.name))) for tensor in self._inputs))
        first: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        logits: Floats = first.asnumpy().astype(np.float32, copy=False)
        return logits


def take_cpu(threads: int) -> None:
    """Let this process run graphs on the CPU, kernel by kernel: for shapes of any size."""
    ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
    ms.set_device("CPU")
    ms.set_context(runtime_num_threads=threads)


def feed(tensor: GraphTensor, values: Ints) -> Tensor:
    """Numbers as an input wants them: slots in one row, lengths maybe in a row or a column of a matrix."""
    if len(tensor.shape) == 1:
        values = values.reshape(-1)
    elif values.ndim == 1:
        values = values[None, :] if tensor.shape[0] == 1 else values[:, None]
    return Tensor.from_numpy(np.array(values, dtype=tensor.dtype))
