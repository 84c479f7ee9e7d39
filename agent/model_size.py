"""How much memory the models of a deployment take, known before one of them is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.manifest import ManifestError, read_manifest
from config.serving_config import ServingConfig, Target

RUNTIME_BYTES = 400 << 20  # of an agent beside weights and cache: MindSpore itself, roughly


@dataclass(frozen=True)
class Need:
    """What the agents of one model need."""

    target: Target
    devices: tuple[int, ...]  # of its agents, of all groups; on a CPU they are numbers and no more
    rank_bytes: int  # of each agent


def needs(config: ServingConfig) -> Iterator[Need]:
    """The needs of every model whose export can be read; what is wrong with the others, ``agent.preflight`` says."""
    for model in config.models:
        try:
            files = [Path(model.path) / name for name in read_manifest(model.path).files]
            exported = sum(file.stat().st_size for file in files if file.suffix != ".json")
        except (ManifestError, OSError):
            continue
        runtime = 0 if model.target == "standin" else RUNTIME_BYTES
        weights = exported // len(model.groups[0])  # each rank of a group has its part
        cache = model.cache_bytes or 0  # None: what its device has left
        yield Need(model.target, model.device_ids, weights + cache + runtime)


def gib(size: int | None) -> str:
    """Bytes in words."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
