"""A rank's way into its group, where ranks compute together; and, as a process, the rendezvous of a group.

``python -m agent.collective`` is MindSpore's scheduler process, see ``agent.rendezvous``. Whom to meet where stands in
the environment of both.
"""

from __future__ import annotations

import logging
import os
import time

from mindspore import communication

from agent.lifeline import ending_with_launcher

BACKENDS = {"cpu": "mccl", "ascend": "hccl"}  # by target: whose collectives the graphs hold

logger = logging.getLogger(__name__)


class CollectiveError(RuntimeError):
    """This rank could not join the others; the message says what to do."""


def join(target: str) -> None:
    """Meet the other ranks on the device that this process has taken: from now on graphs with collectives can be run.

    Raises:
        CollectiveError: this process is no rank of a launcher's, or the others were not there in time.
    """
    if os.environ.get("MS_ROLE") != "MS_WORKER":
        raise CollectiveError("a model of several ranks runs in agents that start_agent.py has started, one for each")
    rank, ranks = os.environ["MS_NODE_ID"], os.environ["MS_WORKER_NUM"]
    started = time.monotonic()
    try:
        with ending_with_launcher():
            communication.init(BACKENDS[target])
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CollectiveError(
            f"rank {rank} of {ranks} did not meet the others at {os.environ['MS_SCHED_HOST']}:"
            f"{os.environ['MS_SCHED_PORT']} within {os.environ['MS_TOPO_TIMEOUT']} s: "
            f"see what their agent-PORT.stderr and rendezvous-PORT.stderr say; MindSpore says: {reason}"
        ) from error
    logger.info("rank %s of %s met the others after %.1f s", rank, ranks, time.monotonic() - started)


def main() -> None:
    """Bring the ranks together, and stay until the launcher ends this process or is gone."""
    os.dup2(2, 1)  # MindSpore writes to both
    with ending_with_launcher():
        communication.init()  # returns when the ranks have left


if __name__ == "__main__":
    main()
