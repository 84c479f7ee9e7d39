"""What a comparison found: as data, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks import machine, picture
from benchmarks.load import Load
from benchmarks.machine import Machine

FOLDER = Path(__file__).resolve().parent.parent / "output" / "bench"
LABELS = {"ours": "this server", "vllm": "vLLM", "llamacpp": "llama.cpp, no server"}
HEAD = (
    "| server | at a time | tokens/s | first token p50 | p99 | a token p50 | p99 | memory | of vLLM's tokens/s "
    "| of llama.cpp's | of the memory floor |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    name: str
    weight_bytes: int  # that one step at batch 1 reads at least
    memory_bytes: int  # of all its processes at the end
    loads: list[Load]
    long_ms: float  # to the first token of a prompt of 1,000 tokens

    def at(self, concurrent: int) -> Load | None:
        """Its load with so many requests at a time."""
        return next((load for load in self.loads if load.concurrent == concurrent), None)


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    machine: Machine
    model: str
    rounds: int
    start_seconds: float  # of ours, until it serves
    servers: list[Measured]
    llamacpp: dict[int, float]  # sequences → tokens/s

    def server(self, name: str) -> Measured | None:
        """The server of this name, if it was measured."""
        return next((one for one in self.servers if one.name == name), None)

    def floor_share(self, server: Measured) -> float | None:
        """The time to read the weights once as a share of a step at batch 1: 1 is the best there is."""
        load = server.at(1)
        return None if load is None else server.weight_bytes / (self.machine.read_gb * 1e9) / (load.token_p50 / 1e3)


def table(comparison: Comparison) -> str:
    """The comparison in Markdown."""
    return "\n".join(
        [
            f"{machine.describe(comparison.machine)}. {comparison.model}, medians of {comparison.rounds} rounds; "
            "times in milliseconds.",
            "",
            HEAD,
            *rows(comparison),
            "",
            "| a prompt of 1,000 tokens | first token | of vLLM's speed |\n|---|--:|--:|",
            *long_rows(comparison),
        ]
    )


def rows(comparison: Comparison) -> Iterator[str]:
    """A row for each number of concurrent requests and each server."""
    peer = comparison.server("vllm")
    for concurrent in [load.concurrent for load in comparison.servers[0].loads]:
        raw = comparison.llamacpp.get(concurrent)
        for server in comparison.servers:
            if (load := server.at(concurrent)) is None:
                continue
            other = peer.at(concurrent) if peer else None
            cells = [
                LABELS[server.name],
                str(concurrent),
                f"{load.tokens_per_second:.0f}",
                *(f"{value:.0f}" for value in (load.first_p50, load.first_p99)),
                *(f"{value:.1f}" for value in (load.token_p50, load.token_p99)),
                f"{server.memory_bytes / 2**30:.2f} GiB",
                ratio(load.tokens_per_second, other.tokens_per_second if other else None),
                ratio(load.tokens_per_second, raw),
                share(comparison.floor_share(server) if concurrent == 1 else None),
            ]
            yield f"| {' | '.join(cells)} |"
        if raw:
            yield f"| {LABELS['llamacpp']} | {concurrent} | {raw:.0f} |  |  |  |  |  |  |  |  |"


def long_rows(comparison: Comparison) -> Iterator[str]:
    """A row for each server."""
    peer = comparison.server("vllm")
    for server in comparison.servers:
        compared = ratio(1 / server.long_ms, 1 / peer.long_ms if peer else None)
        yield f"| {LABELS[server.name]} | {server.long_ms:.0f} ms | {compared} |"


def ratio(value: float, other: float | None) -> str:
    """How many times ``other``; empty if there is none."""
    return f"{value / other:.2f} x" if other else ""


def share(value: float | None) -> str:
    """A percentage; empty if there is none."""
    return "" if value is None else f"{100 * value:.0f} %"


def chart(comparison: Comparison) -> str:
    """Tokens a second as an SVG picture."""
    numbers = [load.concurrent for load in comparison.servers[0].loads]
    series: dict[str, list[float | None]] = {
        LABELS[server.name]: [load.tokens_per_second for load in server.loads] for server in comparison.servers
    }
    if comparison.llamacpp:
        series[LABELS["llamacpp"]] = [comparison.llamacpp.get(number) for number in numbers]
    return picture.bars(f"tokens a second, {comparison.model}", [f"{number} at a time" for number in numbers], series)


def write(comparison: Comparison) -> list[Path]:
    """Write ``latest.json``, ``latest.md`` and ``latest.svg``; their paths."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    contents = {
        "latest.json": msgspec.json.format(msgspec.json.encode(comparison), indent=1).decode() + "\n",
        "latest.md": table(comparison) + "\n",
        "latest.svg": chart(comparison),
    }
    for name, content in contents.items():
        (FOLDER / name).write_text(content, encoding="utf-8")
    return [FOLDER / name for name in contents]


def read() -> Comparison:
    """The latest comparison.

    Raises:
        FileNotFoundError: there was none yet.
    """
    return msgspec.json.decode((FOLDER / "latest.json").read_bytes(), type=Comparison)
