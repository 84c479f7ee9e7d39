"""A MindIR graph as the runners on MindSpore call it, and what one graph shares with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor
from numpy.typing import NDArray

from agent.peers import Peers
from agent.protocol import Floats
from agent.runner import RunnerBroken, first_line
from config.manifest import GraphTensor, Manifest, ManifestError


class CompiledGraph:
    """A graph that is compiled at its first call and only run at the others.

    GraphCell's own call asks each time whether to compile again, which takes it half a millisecond.
    """

    def __init__(self, graph: nn.GraphCell) -> None:
        self._graph = graph
        self._compiled = False

    def __call__(self, *inputs: Tensor) -> Any:
        """Run it on inputs of the dtypes and ranks of the first call."""
        if self._compiled:
            return _cell_graph_executor(self._graph, *inputs, phase=self._graph.phase)
        outputs = self._graph(*inputs)
        self._compiled = True
        return outputs


def placeholder(tensor: GraphTensor) -> Tensor:
    """An input as the manifest describes it."""
    return Tensor(shape=[None if size < 0 else size for size in tensor.shape], dtype=getattr(ms, tensor.dtype))


def placeholders(manifest: Manifest, cache_dtype: str) -> list[Tensor]:
    """The graphs' inputs as the manifest lists them, the cache in the dtype that was chosen."""

    def chosen(tensor: GraphTensor) -> GraphTensor:
        shape = *tensor.shape[:-1], manifest.cache_width(cache_dtype)
        return GraphTensor(tensor.name, cache_dtype, shape) if tensor.name.endswith("_cache") else tensor

    return [placeholder(chosen(tensor)) for tensor in manifest.inputs]


def share_weights(first: nn.GraphCell, second: nn.GraphCell) -> None:
    """Let the second graph use the first one's memory for every weight.

    Raises:
        ManifestError: they do not have the same weights, or MindSpore did not share them.
    """
    ours, theirs = first.parameters_dict(), second.parameters_dict()
    for name in ours.keys() ^ theirs.keys():
        raise ManifestError(f"prefill and decode are not of one export: only one of them has {name}")
    for name, parameter in theirs.items():
        parameter.set_data(ours[name])
        if parameter.data_ptr() != ours[name].data_ptr():
            raise ManifestError(f"prefill and decode do not share the memory of {name}")


def open_peers(folder: Path, manifest: Manifest, rank: int) -> Peers | None:
    """The other ranks, over the graph that gathers; None where there are none."""
    if manifest.world_size == 1:
        return None
    graph = nn.GraphCell(ms.load(str(folder / "gather.mindir")))
    graph.set_inputs(Tensor(shape=[None, None], dtype=ms.float32))
    compiled = CompiledGraph(graph)

    def gather(own: Floats) -> Floats:
        try:
            gathered: Floats = compiled(Tensor.from_numpy(own)).asnumpy()
        except RuntimeError as error:
            raise RunnerBroken(f"the other ranks are gone: {first_line(error)}") from error
        return gathered

    return Peers(gather, rank, manifest.world_size, manifest.vocab_size)


def as_tensor(array: NDArray[np.int32]) -> Tensor:
    """An int32 input of a graph on memory that stays as it is during the call."""
    return Tensor.from_numpy(np.array(array, dtype=np.int32))
