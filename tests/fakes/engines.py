"""What runs a graph behind the stand-in of MindSpore Lite: a rule to check by hand, or MindSpore on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from paged_rule import decode, prefill

Arrays = Mapping[str, NDArray[Any]]


class Engine(Protocol):
    """One graph, ready to run."""

    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Its outputs, for inputs by name in the graph's order."""
        ...


class Rule:
    """A graph without operators but for those that ranks have: which one it is, its inputs say.

    Each rank computes the whole rule, so a collective has nothing to do.
    """

    def __init__(self, graph: Any, variables: dict[str, Any]) -> None:
        for parameter in graph.parameter:
            name = parameter.name.rpartition(":")[2]
            variables.setdefault(name, np.zeros(list(parameter.dims), np.float32))
        self._caches = variables["key_cache"], variables["value_cache"]
        [shape] = [entry.tensor[0].dims for entry in graph.input if entry.name.endswith("tokens")]
        self._compute = decode if shape[1] == 1 else prefill

    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]:
        tokens = inputs["tokens"]
        return [self._compute(inputs, *self._caches), tokens, np.ones(tokens.shape, np.float32)]  # as MindFormers' do


class OnCpu:
    """A graph with operators that MindSpore has for the CPU."""

    def __init__(self, path: Path, variables: dict[str, Any]) -> None:
        import mindspore as ms  # here, since it takes seconds, and most graphs of tests need none of it
        from mindspore import nn

        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        self._tensor = ms.Tensor.from_numpy
        self._cell = nn.GraphCell(ms.load(str(path)))
        for name, parameter in self._cell.parameters_dict().items():
            if name in variables:
                parameter.set_data(variables[name])
            variables[name] = parameter

    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]:
        outputs = self._cell(*map(self._tensor, inputs.values()))
        return [output.asnumpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def open_engine(path: Path, graph: Any, variables: dict[str, Any]) -> Engine:
    """The engine of a graph; ``variables`` are those of its group, to which it adds its own."""
    computes = any(not is_collective(node) for node in graph.node)
    return OnCpu(path, variables) if computes else Rule(graph, variables)


def is_collective(node: Any) -> bool:
    """Whether an operator is one that ranks compute together."""
    return str(node.op_type).startswith("REF::AllReduce")
