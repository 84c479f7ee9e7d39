"""What a network is built from: the Cells that each target has in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from mindspore import Parameter, nn

from models.network_config import NetworkConfig
from models.weight_map import Weights


class OperatorSet(Protocol):
    """The modules ``portable`` and ``native`` are such sets, and so is an ``ascend.Operators``.

    A set leaves alone what it has no use for: only standard operators normalise with an epsilon of their own, for
    example, as the weights of C++ norms end in it.
    """

    @property
    def Embedding(self) -> Callable[[Parameter, Parameter], nn.Cell]:
        """Of ``(weight, norm)``: token ids i32 [T] to their rows [T, hidden]."""

    @property
    def SharedEmbedding(self) -> Callable[[Parameter, Parameter, int], nn.Cell]:
        """Of ``(weight, norm, first_token)``: the same with zeros for the tokens of other ranks."""

    @property
    def GEOMETRY(self) -> Mapping[str, Callable[[Parameter, int], nn.Cell]]:
        """Of each phase, of ``(frequencies, block_size)``: what all layers' attention knows of a step.

        Its Cell takes positions, slot mapping, block tables, query and context lengths; what it returns is between it
        and the layers.
        """

    @property
    def layers(self) -> Callable[[str, NetworkConfig, Weights, nn.Cell | None], list[nn.Cell]]:
        """The layers of a phase in their order, in one Cell each or several in one.

        A Cell takes x [T, hidden], the geometry and the caches, and returns x and what the host has to write. The last
        argument sums up the results of several ranks.
        """

    @property
    def Head(self) -> Callable[[Parameter, float, Parameter], nn.Cell]:
        """Of ``(norm, epsilon, weight)``: x [T, hidden] and indices [L] to logits [L, vocab], or these and more."""
