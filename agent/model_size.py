"""How much memory the models of a deployment take, known before one of them is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.manifest import ManifestError, read_manifest
from config.serving_config import ServingConfig, Target

RUNTIME_BYTES = 400 << 20  # of an agent beside weights and cache: MindSpore itself on a CPU, roughly
GRAPHS_AT_ONCE = 2  # whose weights are on the host while an NPU's agent loads: the second's are then let go


@dataclass(frozen=True)
class Need:
    """What the agents of one model need."""

    target: Target
    devices: tuple[int, ...]  # of its agents, of all groups; on a CPU they are numbers and no more
    rank_bytes: int  # of each agent, where it computes: its device's memory, or the host's
    host_bytes: int  # of each agent, of the host's memory, as long as it runs …
    loading_bytes: int = 0  # … and beside that until its weights are on its device


def needs(config: ServingConfig) -> Iterator[Need]:
    """The needs of every model whose export can be read; what is wrong with the others, ``agent.preflight`` says.

    They are sums of file sizes. CANN's own share of the host's memory is not known here, and not in them.
    """
    for model in config.models:
        try:
            manifest = read_manifest(model.path)
            files = [Path(model.path) / name for name in manifest.files]
            exported = sum(file.stat().st_size for file in files if file.suffix != ".json")
        except (ManifestError, OSError):
            continue
        runtime = 0 if model.target == "standin" else RUNTIME_BYTES
        weights = exported // len(model.groups[0])  # each rank of a group has its part
        if manifest.pair:
            weights //= GRAPHS_AT_ONCE  # both graphs of a pair have them in their files
        rank = weights + (model.cache_bytes or 0) + runtime  # no cache_bytes: what its device has left
        if model.target == "ascend":
            yield Need(model.target, model.device_ids, rank, runtime, GRAPHS_AT_ONCE * weights)
        else:
            yield Need(model.target, model.device_ids, rank, rank)


def gib(size: int | None) -> str:
    """Bytes in words."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
