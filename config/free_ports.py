"""Ports for processes that this machine is about to start."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
FIRST = 10_000  # below are those of common services
TRIES = 1_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # first and last of those that the system gives to clients


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nothing uses; whoever takes one first has it.

    They are none of those that the system gives to outgoing connections, which would take one now and then before the
    process that it is meant for.
    """
    ports: list[int] = []
    with contextlib.ExitStack() as opened:
        candidates = (
            (random.randrange(FIRST, last) for _ in range(TRIES)) if (last := first_ephemeral()) > FIRST else ()
        )
        for port in (*candidates, *([0] * count)):  # 0: any, where there are no others
            if len(ports) == count:
                break
            one = opened.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # it is taken
                one.bind((HOST, port))
                ports.append(one.getsockname()[1])
    return ports


def first_ephemeral() -> int:
    """The first port that the system gives to outgoing connections; 0 where it does not say."""
    try:
        return int(EPHEMERAL.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 0
