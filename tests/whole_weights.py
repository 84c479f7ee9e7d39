"""A checkpoint's weights, or a rank's part of them, as Parameters that hold them: for networks that are run."""

from __future__ import annotations

from mindspore import Parameter, Tensor

from models.weight_map import WeightSource


class Weights:
    """Each read once, in float32."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._made: dict[str, Parameter] = {}

    def get(self, name: str) -> Parameter | None:
        """The weight of that name, or None if this network has none."""
        if name not in self._source.config.weight_shapes():
            return None
        if name not in self._made:
            self._made[name] = Parameter(Tensor(self._source.read(name)), name=name, requires_grad=False)
        return self._made[name]
