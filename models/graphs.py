"""The MindIR files of one model: its networks, compiled for dynamic shapes and written to a folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import mindspore as ms
from mindspore import Tensor, nn

from config.manifest import LOGITS_RUN, Capabilities, GraphTensor, rank_folder
from config.serving_config import WeightFormat
from models import ascend, ascend_graphs, mindir, portable
from models.checkpoint import Checkpoint
from models.collectives import WORLD_GROUP, AllGather, AllReduce, Share
from models.hollow_weights import HollowWeights, write_phase
from models.network import Network, Phase
from models.network_config import NetworkConfig
from models.post_sampling import Argmax, TopK
from models.sharding import shards
from models.weight_map import WeightSource

PHASES: tuple[Phase, ...] = ("prefill", "decode")

logger = logging.getLogger(__name__)


def write_graphs(
    checkpoint: Checkpoint, folder: Path, operators: str, weight_format: WeightFormat, block_size: int, ranks: int
) -> Contract:
    """Write every rank's prefill and decode MindIR with their common weights, and the model's argmax and topk MindIR.

    Raises:
        CheckpointError: the model cannot be cut for so many ranks.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    group = WORLD_GROUP["ascend" if operators == "ascend" else "cpu"]
    if ranks == 1:
        contract = write_rank(checkpoint, folder, operators, weight_format, block_size, None)
    else:
        for rank, shard in enumerate(shards(checkpoint, ranks)):
            logger.info("rank %d of %d", rank, ranks)
            place = folder / rank_folder(rank, ranks)
            place.mkdir()
            share = Share(shard.first_token, AllReduce(group))
            own = write_rank(shard, place, operators, weight_format, block_size, share)
            write_graph(AllGather(group, ranks), place / "gather.mindir", dynamic(ms.float32, None, None))
            contract = contract if rank else own
            assert contract.inputs == own.inputs, "ranks take different inputs"
    logits, ints, numbers = dynamic(ms.float32, None, None), dynamic(ms.int32), dynamic(ms.float32, None)
    write_graph(Argmax(), folder / "argmax.mindir", logits)
    write_graph(TopK(), folder / "topk.mindir", logits, numbers, ints)
    return contract


def write_rank(
    source: WeightSource,
    folder: Path,
    operators: str,
    weight_format: WeightFormat,
    block_size: int,
    share: Share | None,
) -> Contract:
    """Write prefill and decode MindIR of one rank and the weights that they have in common."""
    config = source.config
    if operators == "ascend":
        inputs, outputs = ascend_graphs.write_rank(source, folder, weight_format, block_size, share)
        return Contract(inputs, outputs, config.num_kv_heads)
    module = operator_module(operators)
    weights, placeholders = HollowWeights(source, module, weight_format), graph_inputs(config, block_size)
    contracts = set()
    with (folder / mindir.WEIGHTS_FILE).open("wb") as file:
        weights_file = mindir.WeightsFile(file)
        for phase in PHASES:
            logger.info("exporting %s graph, %d layers", phase, config.num_layers)
            network = Network(config, weights.get, module, phase, block_size, share)
            contracts.add(write_phase(network, folder / f"{phase}.mindir", placeholders, weights_file, weights))
    assert len(contracts) == 1, "prefill and decode take different inputs"
    return Contract(contracts.pop(), graph_outputs(config, operators), config.num_kv_heads)


def capabilities(operators: str) -> Capabilities:
    """What one call of graphs with these operators can hold."""
    return Capabilities(max_num_batched_tokens=operator_module(operators).MAX_STEP_TOKENS)


@dataclass(frozen=True)
class Contract:
    """What goes into prefill and decode, as the files say, and what comes out; the same for both."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]  # of rank 0; the last rank may have fewer logits
    cache_heads: int  # key/value heads of each rank


def operator_module(operators: str) -> ModuleType:
    """The side of the seam to build from."""
    if operators == "portable":
        return portable
    if operators == "ascend":
        return ascend
    from models import native  # here: it is of use only where our library can be built

    return native


def graph_inputs(config: NetworkConfig, block_size: int) -> list[Tensor]:
    """Placeholders for ``Network.construct``'s arguments, in order. The cache's number of blocks stays open."""
    tokens, rows = dynamic(ms.int32, None), dynamic(ms.int32, None)
    cache = dynamic(ms.float32, None, block_size, config.num_kv_heads, config.head_dim)
    return [tokens, tokens, tokens, dynamic(ms.int32, None, None), rows, rows, rows, cache, cache]


def graph_outputs(config: NetworkConfig, operators: str) -> tuple[GraphTensor, ...]:
    """What ``Network.construct`` returns."""
    logits = GraphTensor(name="logits", dtype="float32", shape=(-1, config.vocab_size))
    if operators == "native":
        return (logits, GraphTensor(name="maxima", dtype="float32", shape=(-1, -(-config.vocab_size // LOGITS_RUN))))
    shape = (config.num_layers, -1, config.num_kv_heads, config.head_dim)
    return (logits, *(GraphTensor(name=name, dtype="float32", shape=shape) for name in ("new_keys", "new_values")))


def dynamic(dtype: ms.Type, *shape: int | None) -> Tensor:
    """A placeholder; None is a dimension that each call chooses."""
    return Tensor(shape=list(shape), dtype=dtype)


def write_graph(cell: nn.Cell, path: Path, *inputs: Tensor) -> None:
    """Compile ``cell`` for ``inputs`` and write it with its weights to ``path``, which ends in .mindir.

    Weights beyond 1 GB stand in a folder beside it.
    """
    ms.export(cell, *inputs, file_name=str(path), file_format="MINDIR")
    split = path.with_name(f"{path.stem}_graph.mindir")
    if split.exists():
        split.rename(path)
    path.chmod(0o644)  # MindSpore's files are for their owner alone, and who exports a model need not be who serves it
