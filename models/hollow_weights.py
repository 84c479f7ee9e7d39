"""Weights that are nothing but dtype and shape while MindSpore compiles a network, and the graphs that come of it.

What they hold goes from the checkpoint straight into the file that all graphs of a rank share, one weight at a time, so
the memory of an export hardly depends on the number of layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer
from mindspore.train.mind_ir_pb2 import ModelProto

from config.manifest import GraphTensor
from config.serving_config import WeightFormat
from models import mindir
from models.network_config import NetworkConfig
from models.weight_map import Rows, WeightSource


class Packing(Protocol):
    """How a target wants its weights: the modules ``portable``, ``native`` and ``ascend`` say so."""

    def names(self, config: NetworkConfig) -> Collection[str]:
        """What there is: the network's weights, and what else its Cells want to have as one."""

    def layout(self, source: WeightSource, name: str, weights: WeightFormat) -> tuple[Any, tuple[int, ...]]:
        """MindSpore's dtype and the shape of what ``read`` returns, without reading it."""

    def read(self, source: WeightSource, name: str, weights: WeightFormat) -> Rows:
        """What one of the names stands for, as the target's operators want it."""


class HollowWeights:
    """A network's weights as Parameters; only vectors have memory."""

    def __init__(self, source: WeightSource, packing: Packing, weights: WeightFormat) -> None:
        self._source = source
        self._packing = packing
        self._weights = weights
        self._names = packing.names(source.config)
        self._vectors = {name for name, shape in source.config.weight_shapes().items() if len(shape) == 1}
        self._made: dict[str, Parameter] = {}
        self._hollow: dict[int, str] = {}  # id of a Parameter without memory → name of its weight

    def get(self, name: str) -> Parameter | None:
        """What has that name, or None if this network has nothing of it."""
        if name not in self._names:
            return None
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Parameter:
        if name in self._vectors:  # small, and what Cells compute constants from
            value = Tensor(self._packing.read(self._source, name, self._weights))
            return Parameter(value, name=name, requires_grad=False)
        dtype, shape = self._packing.layout(self._source, name, self._weights)
        nothing = initializer("zeros", shape, dtype)  # made if asked for: never
        parameter = Parameter(nothing, name=name, requires_grad=False)
        self._hollow[id(parameter)] = name
        return parameter

    def read(self, parameter: Parameter) -> bytes:
        """What one Parameter of a network holds: a weight, or a constant of the network's own."""
        name = self._hollow.get(id(parameter))
        if name is None:
            return bytes(parameter.asnumpy().tobytes())
        value = self._packing.read(self._source, name, self._weights)
        assert value.shape == tuple(parameter.shape), f"{name}: {value.shape} in a graph for {parameter.shape}"
        return value.tobytes()


def write_phase(
    cell: nn.Cell,
    path: Path,
    inputs: Sequence[Tensor],
    weights_file: mindir.WeightsFile,
    weights: HollowWeights,
    names: Sequence[str] = (),
) -> tuple[GraphTensor, ...]:
    """Write a network's graph to ``path``, its weights to ``weights_file``, and say what inputs the graph has.

    ``names``: see ``export_graph``.
    """
    model = export_graph(cell, path, inputs, names)
    parameters = cell.parameters_dict()
    for parameter in model.graph.parameter:
        weights_file.put(parameter, lambda name: weights.read(parameters[name]))
    path.write_bytes(model.SerializeToString())
    return mindir.inputs(model)


def export_graph(cell: nn.Cell, path: Path, inputs: Sequence[Tensor], names: Sequence[str] = ()) -> ModelProto:
    """A Cell's graph, which lists its weights and holds none. MindSpore leaves another at ``path``: write over it.

    ``names``: of its inputs, in feed order, where those of ``construct`` will not do.
    """
    model = ModelProto()

    def keep(exported: Any) -> None:
        model.CopyFrom(exported)
        del exported.graph.parameter[:]  # so MindSpore does not write zeros for them

    ms.export(cell, *inputs, file_name=str(path), file_format="MINDIR", custom_func=keep)
    path.chmod(0o644)  # MindSpore's files are for their owner alone, and who exports a model need not be who serves it
    if names:
        mindir.name_inputs(model, names)
    mindir.link(model, mindir.LIBRARY)
    return model
