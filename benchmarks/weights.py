"""How many bytes of weights one decode step of an exported model reads at least."""

from __future__ import annotations

from pathlib import Path

from models import mindir


def step_bytes(folder: Path) -> int:
    """All weights once, but of the embedding only what is also the head: a step looks up a row for each token."""
    graph = mindir.read(folder / "decode.mindir").graph
    sizes = {mindir.plain_name(one.name): int(one.external_data.length) for one in graph.parameter}
    return sum(sizes.values()) - (sizes["embed_tokens"] if "head" in sizes else 0)
