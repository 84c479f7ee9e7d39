"""Run a pair of paged MindIR graphs that another exporter wrote and ``models.adopt`` made a model folder of.

Such graphs hold the cache as Parameters, so its size and type are theirs; the decode graph is given the prefill
graph's, and the weights with it. A call holds prompts or next tokens, never both, and no prompt on cached tokens. Block
0 is the null block here as everywhere: rows that only fill a graph's fixed number read and write there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from agent.ascend_runner import take_device
from agent.cache_probe import sharing_error
from agent.logits import Logits
from agent.model_runner import LOGIT_TOLERANCE, CompiledGraph, share_weights
from agent.placement import physical_cores
from agent.protocol import Floats, Ints
from agent.runner import RunnerBroken
from agent.step_batch import PlanError, StepBatch
from config.manifest import GraphTensor, ManifestError, PagedGraph, read_manifest, verify_files

logger = logging.getLogger(__name__)


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
        self._padding_slot = pair.padding_slot
        self._prefill = PairGraph(folder, pair.prefill, prompts=True)
        self._decode = PairGraph(folder, pair.decode, prompts=False)
        share_weights(self._prefill.cell, self._decode.cell)
        self._prove_sharing()

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
            PlanError: a prompt's first tokens are cached, or logits of another than a row's last position are wanted.
            RunnerBroken: an operator failed; MindSpore runs a graph no more after that.
        """
        ends = np.cumsum(batch.query_lens)
        wanted = np.searchsorted(ends, batch.logits_indices, side="right")  # [L], rows
        if not np.array_equal(ends[wanted] - 1, batch.logits_indices):
            raise PlanError("logits_indices: this model's graphs give logits of a row's last token only")
        longer = batch.query_lens > 1
        if (batch.context_lens > batch.query_lens)[longer].any():
            raise PlanError("query_lens: this model's graphs continue no prompt whose first tokens are cached")
        logits = np.empty((batch.query_lens.size, self.manifest.vocab_size), dtype=np.float32)
        for graph, rows in ((self._decode, np.flatnonzero(~longer)), (self._prefill, np.flatnonzero(longer))):
            for some in graph.calls(rows):
                logits[some] = self._call(graph, batch, some)
        return Logits.of(logits[wanted])

    def _call(self, graph: PairGraph, batch: StepBatch, rows: Ints) -> Floats:
        """Some rows in one call of a graph, with padding where its shape is fixed: the logits of their last tokens."""
        lengths = batch.query_lens[rows]
        height, width = graph.shape(rows.size, int(lengths.max()))
        tokens = np.zeros((height, width), np.int32)
        slots = np.full((height, width), self._padding_slot, np.int32)
        valid = np.ones(height, np.int32)
        valid[: rows.size] = batch.context_lens[rows]
        used = -(-int(valid.max()) // self.manifest.block_size)
        tables = np.zeros((height, max(used, graph.table_width)), np.int32)
        tables[: rows.size, :used] = batch.block_tables[rows, :used]
        inside = np.arange(width) < lengths[:, None]  # [rows, width]
        own = np.isin(np.repeat(np.arange(batch.query_lens.size), batch.query_lens), rows)  # [T]
        tokens[: rows.size][inside] = batch.token_ids[own]
        given = batch.slot_mapping[own]
        slots[: rows.size][inside] = np.where(given < 0, self._padding_slot, given)
        inputs = {
            "token_ids": tokens,
            "valid_lengths": valid,
            "block_tables": tables,
            "slot_mapping": slots.reshape(-1),
        }
        try:
            logits = graph(inputs)
        except RuntimeError as error:
            raise RunnerBroken(str(error).strip().splitlines()[0]) from error
        logits = logits.reshape(height, -1, self.manifest.vocab_size)
        last = lengths - 1 if logits.shape[1] > 1 else np.zeros_like(lengths)  # or of each row's last token only
        wanted: Floats = logits[np.arange(rows.size), last]
        return wanted

    def _prove_sharing(self) -> None:
        """See that the graphs work on one cache: tokens decoded after a prefill see what that wrote.

        Raises:
            ManifestError: their logits differ from those of the same tokens in one prefill.
        """
        error = sharing_error(self)
        if not error <= LOGIT_TOLERANCE[self.cache_dtype]:
            raise ManifestError(
                f"{self.manifest.name}: its prefill and decode graph do not share their cache, or want another padding "
                f"slot (logits differ by {error:.1g} of the largest); python -m models.adopt has --padding-slot"
            )
        logger.info("prefill and decode share cache and weights: logits agree to %.1g of the largest", error)


class PairGraph:
    """One graph of a pair: how many rows and tokens a call holds, and how it is fed."""

    def __init__(self, folder: Path, graph: PagedGraph, *, prompts: bool) -> None:
        self._prompts = prompts
        self._inputs = graph.inputs
        self.cell = nn.GraphCell(ms.load(str(folder / graph.file)))
        self.cell.set_inputs(*map(placeholder, graph.inputs))  # without this each new shape is compiled anew
        self._compiled = CompiledGraph(self.cell)
        self._height, self._width = self._shape_of("token_ids")
        self.table_width = self._shape_of("block_tables")[1] if "block_tables" in self._names else -1

    def calls(self, rows: Ints) -> Iterator[Ints]:
        """The rows in as many at a time as a call holds.

        Where the graph leaves that open, next tokens go all together, and each prompt alone: some exporters want
        prompts one behind the other, others side by side, and of one prompt both are the same.
        """
        most = self._height if self._height > 0 else 1 if self._prompts else max(1, rows.size)
        for first in range(0, rows.size, most):
            yield rows[first : first + most]

    def shape(self, rows: int, longest: int) -> tuple[int, int]:
        """Rows and tokens of each in a call, for so many of which the longest has so many new tokens."""
        return self._height if self._height > 0 else rows, self._width if self._width > 0 else longest

    def __call__(self, inputs: dict[str, Ints]) -> Floats:
        """Feed it, each input by what it is for: its first output, as float32."""
        outputs = self._compiled(*(feed(tensor, inputs[tensor.name]) for tensor in self._inputs))
        first: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        logits: Floats = first.asnumpy().astype(np.float32, copy=False)
        return logits

    @property
    def _names(self) -> list[str]:
        return [tensor.name for tensor in self._inputs]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._inputs[self._names.index(name)].shape


def take_cpu(threads: int) -> None:
    """Let this process run graphs on the CPU, kernel by kernel: for shapes of any size."""
    ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
    ms.set_device("CPU")
    ms.set_context(runtime_num_threads=threads)


def placeholder(tensor: GraphTensor) -> Tensor:
    """An input of a graph as its manifest describes it."""
    return Tensor(shape=[None if size < 0 else size for size in tensor.shape], dtype=getattr(ms, tensor.dtype))


def feed(tensor: GraphTensor, values: Ints) -> Tensor:
    """Numbers as an input wants them: lengths can be a row or a column of a matrix."""
    if len(tensor.shape) > values.ndim:
        values = values[None, :] if tensor.shape[0] == 1 else values[:, None]
    return Tensor.from_numpy(np.array(values, dtype=tensor.dtype))
