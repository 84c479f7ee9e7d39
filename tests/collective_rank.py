"""One rank of a test of collectives, as a process: joins, runs a MindIR on its own number, and prints what came out."""

from __future__ import annotations

import os
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from agent import collective


def main() -> None:
    """Run ``collective_rank.py FILE``; the rank stands in the environment, see ``agent.rendezvous``."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    collective.join("cpu")
    graph = nn.GraphCell(ms.load(sys.argv[1]))
    total, gathered = graph(Tensor(np.full((1, 2), int(os.environ["MS_NODE_ID"]) + 1, np.float32)))
    print(total.asnumpy().tolist(), gathered.asnumpy().tolist(), flush=True)
    sys.stdin.read()  # a rank that leaves ends the group


if __name__ == "__main__":
    main()
