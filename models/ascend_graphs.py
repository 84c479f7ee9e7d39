"""The MindIR files of one rank for Ascend: a graph for each kind of step, and two that copy blocks of the cache.

Any machine can write them, no weight but one in memory at a time (``models.hollow_weights``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.ops import auto_generate

from config.manifest import GraphTensor
from config.serving_config import WeightFormat
from models import ascend, mindir
from models.collectives import Share
from models.hollow_weights import HollowWeights, export_graph, write_phase
from models.network import Network
from models.network_config import NetworkConfig
from models.weight_map import WeightSource

# MindSpore's attention kernels look up the lengths among the graph's inputs, by the last two of these names
NAMES = ("token_ids", "positions", "slot_mapping", "block_tables", "q_seq_lens", "batch_valid_length", "logits_indices")

logger = logging.getLogger(__name__)


class PerLayerCaches(nn.Cell):  # type: ignore[misc]
    """A network whose caches are an input for each layer: all layers' keys, then all layers' values."""

    def __init__(self, network: Network, num_layers: int) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.num_layers = num_layers

    def construct(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        query_lens: Tensor,
        context_lens: Tensor,
        logits_indices: Tensor,
        *caches: Tensor,
    ) -> Any:
        step = token_ids, positions, slot_mapping, block_tables, query_lens, context_lens, logits_indices
        return self.network(*step, caches[: self.num_layers], caches[self.num_layers :])


def write_rank(
    source: WeightSource, folder: Path, weights: WeightFormat, block_size: int, share: Share | None
) -> tuple[tuple[GraphTensor, ...], tuple[GraphTensor, ...]]:
    """Write the graph of each phase and the weights that they have in common: their inputs and outputs."""
    config = source.config
    side = ascend.npu(weights, config.context_length)
    hollow = HollowWeights(source, ascend, weights)
    inputs, names = graph_inputs(config, weights, block_size), input_names(config.num_layers)
    contracts = set()
    with (folder / mindir.WEIGHTS_FILE).open("wb") as file:
        weights_file = mindir.WeightsFile(file)
        for phase in ascend.PHASES:
            logger.info("exporting %s graph, %d layers", phase, config.num_layers)
            network = Network(config, hollow.get, side, phase, block_size, share)
            cell = PerLayerCaches(network, config.num_layers)
            contracts.add(write_phase(cell, folder / f"{phase}.mindir", inputs, weights_file, hollow, names))
    assert len(contracts) == 1, "the graphs take different inputs"
    write_copying(folder, config, weights, block_size)
    return contracts.pop(), (GraphTensor(name="logits", dtype="float32", shape=(-1, config.vocab_size)),)


def write_copying(folder: Path, config: NetworkConfig, weights: WeightFormat, block_size: int) -> None:
    """Write the two graphs that copy blocks of all layers."""
    caches = graph_inputs(config, weights, block_size)[len(NAMES) :]
    numbers = Tensor(shape=[None], dtype=ms.int32)
    tokens = [Tensor(shape=[None, config.num_kv_heads * config.head_dim], dtype=caches[0].dtype)] * len(caches)
    cache_names = input_names(config.num_layers)[len(NAMES) :]
    graphs = {
        "read_blocks": (ascend.ReadBlocks(), [numbers, *caches], ("blocks", *cache_names)),
        "write_blocks": (
            ascend.WriteBlocks(auto_generate, config.num_layers),
            [numbers, *tokens, *caches],
            ("slots", *(f"{name}_tokens" for name in cache_names), *cache_names),
        ),
    }
    for name, (cell, inputs, names) in graphs.items():
        path = folder / f"{name}.mindir"
        path.write_bytes(export_graph(cell, path, inputs, names).SerializeToString())


def graph_inputs(config: NetworkConfig, weights: WeightFormat, block_size: int) -> list[Tensor]:
    """Placeholders for the arguments of ``PerLayerCaches.construct``. The cache's number of blocks stays open."""
    one, two = Tensor(shape=[None], dtype=ms.int32), Tensor(shape=[None, None], dtype=ms.int32)
    shape = [None, block_size, config.num_kv_heads, config.head_dim]
    cache = Tensor(shape=shape, dtype=getattr(ms, weights))
    return [one, one, one, two, one, one, one, *[cache] * (2 * config.num_layers)]


def input_names(num_layers: int) -> tuple[str, ...]:
    """The graphs' inputs in feed order."""
    return (*NAMES, *(f"{kind}_cache_{layer}" for kind in ("key", "value") for layer in range(num_layers)))
