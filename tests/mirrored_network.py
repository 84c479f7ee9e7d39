"""The Cells that are exported for Ascend, on mirrors of the NPU's operators, and what they must agree with."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray
from paged_rows import Row, step
from whole_weights import Weights

from agent.ascend_runner import Graphs
from agent.step_batch import StepBatch
from models import ascend, ascend_mirror, portable
from models.ascend_graphs import PerLayerCaches
from models.checkpoint import Checkpoint
from models.collectives import Share
from models.network import Network
from models.weight_map import WeightSource

BLOCK_SIZE, NUM_BLOCKS = 16, 12
Array = NDArray[np.float32]

ms.set_device("CPU")  # before the first operator runs, whichever test that is in


class MirroredModel:
    """A checkpoint's networks on mirrored operators, with one cache for all phases. MindSpore is set to run them."""

    def __init__(self, source: WeightSource, share: Share | None = None) -> None:
        ms.set_context(mode=ms.PYNATIVE_MODE)
        config = source.config
        side = ascend_mirror.mirrored(np.float32, config.context_length)
        weights = Weights(source)
        self.networks = {
            phase: PerLayerCaches(Network(config, weights.get, side, phase, BLOCK_SIZE, share), config.num_layers)
            for phase in ("prefill", "chunk", "decode")
        }
        shape = (NUM_BLOCKS, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        # Filled with what must not be read: a NaN would spread
        self.caches = [Tensor.from_numpy(np.full(shape, np.nan, np.float32)) for _ in range(2 * config.num_layers)]
        self.graphs = Graphs(self.networks, ascend.ReadBlocks(), ascend.WriteBlocks(ascend_mirror, config.num_layers))

    def run(self, phase: str, batch: StepBatch) -> Array:
        logits: Array = self.networks[phase](*inputs_of(batch), *self.caches).asnumpy()
        return logits


def inputs_of(batch: StepBatch) -> list[Tensor]:
    arrays = batch.token_ids, batch.positions, batch.slot_mapping, batch.block_tables, batch.query_lens
    return [Tensor(array) for array in (*arrays, batch.context_lens, batch.logits_indices)]


def portable_logits(checkpoint: Checkpoint, tokens: list[int]) -> Array:
    """The logits of every position, all in one call of the portable network."""
    config = checkpoint.config
    network = Network(config, Weights(checkpoint).get, portable, "prefill", BLOCK_SIZE)
    shape = (config.num_layers * 2, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    cache = Tensor(np.zeros(shape, np.float32))
    row = Row([1] * -(-len(tokens) // BLOCK_SIZE), tokens)
    batch = step([row], [len(tokens)], BLOCK_SIZE, every_position=True)
    logits: Array = network(*inputs_of(batch), cache, cache)[0].asnumpy()
    return logits
