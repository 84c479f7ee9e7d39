"""The MindIR files of one rank for Ascend: written on any machine, no weight but one in memory at a time.

MindSpore compiles a network whose weights are nothing but shapes; what they hold goes from the checkpoint straight into
the file that all graphs share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
from google.protobuf.message import Message
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer
from mindspore.ops import auto_generate

from config.manifest import GraphTensor
from config.serving_config import WeightFormat
from models import ascend, mindir
from models.collectives import Share
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
    contracts = set()
    with (folder / mindir.WEIGHTS_FILE).open("wb") as file:
        weights_file = mindir.WeightsFile(file)
        for phase in ascend.PHASES:
            logger.info("exporting %s graph, %d layers", phase, config.num_layers)
            hollow = HollowWeights(source, weights)
            network = Network(config, hollow.get, side, phase, block_size, share)
            path = folder / f"{phase}.mindir"
            inputs = graph_inputs(config, weights, block_size)
            left_out = write_graph(
                PerLayerCaches(network, config.num_layers), path, inputs, input_names(config.num_layers)
            )
            place_weights(path, left_out, weights_file, hollow.reader(network))
            contracts.add(mindir.inputs(mindir.read(path)))
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
        write_graph(cell, folder / f"{name}.mindir", inputs, names)


class HollowWeights:
    """A network's weights as Parameters that have dtype and shape, and no memory."""

    def __init__(self, source: WeightSource, weights: WeightFormat) -> None:
        self._source = source
        self._weights = weights
        self._shapes = source.config.weight_shapes()
        self._made: dict[str, Parameter] = {}

    def get(self, name: str) -> Parameter | None:
        """The weight of that name, or None if this network has none."""
        if name not in self._shapes:
            return None
        if name not in self._made:
            nothing = initializer("zeros", self._shapes[name], getattr(ms, self._weights))  # made if asked for: never
            self._made[name] = Parameter(nothing, name=name, requires_grad=False)
        return self._made[name]

    def reader(self, network: Network) -> Callable[[str], bytes]:
        """What the parameters of a network hold, by the names that its Cells give them: weights, and its constants."""
        parameters = network.parameters_dict()
        names = {id(parameter): name for name, parameter in self._made.items()}

        def read(parameter: str) -> bytes:
            name = names.get(id(parameters[parameter]))
            if name is None:
                return bytes(parameters[parameter].asnumpy().tobytes())
            return ascend.read(self._source, name, self._weights).tobytes()

        return read


def graph_inputs(config: NetworkConfig, weights: WeightFormat, block_size: int) -> list[Tensor]:
    """Placeholders for the arguments of ``PerLayerCaches.construct``. The cache's number of blocks stays open."""
    one, two = Tensor(shape=[None], dtype=ms.int32), Tensor(shape=[None, None], dtype=ms.int32)
    shape = [None, block_size, config.num_kv_heads, config.head_dim]
    cache = Tensor(shape=shape, dtype=getattr(ms, weights))
    return [one, one, one, two, one, one, one, *[cache] * (2 * config.num_layers)]


def input_names(num_layers: int) -> tuple[str, ...]:
    """The graphs' inputs in feed order."""
    return (*NAMES, *(f"{kind}_cache_{layer}" for kind in ("key", "value") for layer in range(num_layers)))


def write_graph(cell: nn.Cell, path: Path, inputs: list[Tensor], names: tuple[str, ...]) -> list[Message]:
    """Write a graph to ``path``, its inputs under these names; returns what it says of its weights, which it lacks."""
    weights: list[Message] = []

    def take(model: Any) -> None:
        weights.extend(model.graph.parameter)
        del model.graph.parameter[:]  # so MindSpore does not write zeros for them

    ms.export(cell, *inputs, file_name=str(path), file_format="MINDIR", custom_func=take)
    model = mindir.read(path)
    mindir.name_inputs(model, names)
    path.chmod(0o644)
    path.write_bytes(model.SerializeToString())
    return weights


def place_weights(
    path: Path, weights: list[Message], weights_file: mindir.WeightsFile, bytes_of: Callable[[str], bytes]
) -> None:
    """Put the weights of a graph into ``weights_file``, and where they are there into the graph."""
    model = mindir.read(path)
    model.graph.parameter.extend(weights)
    for parameter in model.graph.parameter:
        weights_file.put(parameter, bytes_of)
    path.write_bytes(model.SerializeToString())
