"""The rank table of HCCL: a JSON file that says which device of which server is which rank."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

VARIABLES = ("RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH")  # either names the file; hccl reads both alike


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the form of a rank table of version 1.0; whether its addresses answer is not asked."""
    try:
        table = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}"
        return
    except msgspec.DecodeError as error:
        yield f"{path}: is not JSON: {error}"
        return
    if not isinstance(table, dict):
        yield "is no JSON object"
        return
    if table.get("version") != "1.0":
        yield f'version is {table.get("version")!r}; known is "1.0"'
    if table.get("status") != "completed":
        yield f'status is {table.get("status")!r}, not "completed": its writer has not finished'
    servers = table.get("server_list")
    if not isinstance(servers, list) or not all(isinstance(server, dict) for server in servers) or not servers:
        yield "server_list lists no servers"
        return
    if str(table.get("server_count")) != str(len(servers)):
        yield f"server_count is {table.get('server_count')!r}, but server_list has {len(servers)}"
    yield from _device_problems(servers)


def _device_problems(servers: list[dict[str, Any]]) -> Iterator[str]:
    ranks: list[str] = []
    for server in servers:
        name = server.get("server_id")
        devices = server.get("device")
        if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices) or not devices:
            yield f"server {name}: device lists no devices"
            continue
        for device in devices:
            for key in ("device_id", "device_ip", "rank_id"):
                if not isinstance(device.get(key), str):
                    yield f"server {name}: {key} is {device.get(key)!r}; every value is a string"
            if not _is_address(device.get("device_ip")):
                yield f"server {name}: device_ip {device.get('device_ip')!r} is no address; see hccn_tool -i N -ip -g"
        numbers = [device.get("device_id") for device in devices]
        if len(set(map(str, numbers))) < len(numbers):
            yield f"server {name}: a device is listed twice"
        ranks += [str(device.get("rank_id")) for device in devices]
    if sorted(ranks) != sorted(str(rank) for rank in range(len(ranks))):
        yield f"rank_id goes from 0 to {len(ranks) - 1}, each once; found: {', '.join(sorted(ranks))}"


def _is_address(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(ipaddress.ip_address(text))
    except ValueError:
        return False
