"""Ports that stay free until the process that they are meant for takes them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from config import free_ports as module
from config.free_ports import FIRST, HOST, first_ephemeral, free_ports


def test_they_are_different_free_and_not_given_to_clients() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(FIRST <= port < first_ephemeral() for port in ports)
    for port in ports:
        with socket.socket() as taken:
            taken.bind((HOST, port))


@pytest.mark.parametrize("said", ["1024\t65535\n", "", None])
def test_where_there_are_no_others_any_port_will_do(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    if said is not None:
        file.write_text(said, encoding="ascii")
    monkeypatch.setattr(module, "EPHEMERAL", file)
    assert len(set(free_ports(5))) == 5
