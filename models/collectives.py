"""What the ranks of one model compute together: MindSpore's collectives as Cells.

A group's name is written into the graph, so a graph is for one target. No process group is needed to export one.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspore import Tensor, nn, ops

WORLD_GROUP = {"cpu": "mccl_world_group", "ascend": "hccl_world_group"}  # all processes of a collective, by target


class AllReduce(nn.Cell):  # type: ignore[misc]
    """The sum of every rank's tensor, on every rank."""

    def __init__(self, group: str) -> None:
        super().__init__(auto_prefix=False)
        self.sum = ops.AllReduce(group=group)

    def construct(self, x: Tensor) -> Tensor:
        return self.sum(x)


class AllGather(nn.Cell):  # type: ignore[misc]
    """Every rank's tensor ``[L, W]`` one below the other, ``[ranks * L, W]``, on every rank."""

    def __init__(self, group: str, world_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.gather = ops.AllGather(group=group)
        self.gather.add_prim_attr("rank_size", world_size)  # MindSpore takes it from this process, which is no rank

    def construct(self, x: Tensor) -> Tensor:
        return self.gather(x)


@dataclass(frozen=True)
class Share:
    """What a network must know of being one rank's part of a larger one."""

    first_token: int  # of its rows of embedding and head
    reduce: AllReduce  # sums up the ranks' results
