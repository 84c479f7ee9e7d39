"""What ``benchmarks.simulate`` found: as data, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import picture, result_files
from benchmarks.latency import Spread, spread
from benchmarks.replay import Outcome, Totals

OUTPUT = Path(__file__).resolve().parent.parent / "output" / "bench" / "simulate"
PICTURED = ("ttft", "tpot")

Settings = Mapping[str, Any]  # fields of ``Limits``


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One replay; times in milliseconds unless they are named seconds."""

    settings: dict[str, Any]  # the limits that are swept
    rate: float | None  # None: the arrivals of a file
    requests: int  # that were answered
    refused: int
    seconds: float
    tokens: int
    tokens_per_second: float
    requests_per_second: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    queue: Spread | None
    ttft_by_priority: dict[int, Spread | None]
    utilisation: float  # the devices' time at work, of all
    steps: int
    rows_per_step: float
    computed_tokens: int
    wasted_rows: int
    preemptions: int
    hit_rate: float  # prompt tokens found in the cache at the first admission
    cache_used: float  # blocks with an owner, on average
    in_system: float  # requests in queue or at work, on average


def cell_of(
    outcomes: Sequence[Outcome], totals: Totals, settings: Settings, rate: float | None
) -> tuple[Cell, dict[str, list[float]]]:
    """The figures of one replay, and all values of each latency in milliseconds, for the picture."""
    answers = [outcome.answer for outcome in outcomes]
    values = {
        "TTFT": [1e3 * answer.first for answer in answers],
        "TPOT": [1e3 * answer.per_token for answer in answers if answer.tokens > 1],
        "ITL": [1e3 * gap for answer in answers for gap in answer.gaps],
        "E2E": [1e3 * answer.whole for answer in answers],
    }
    by_priority: dict[int, list[float]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.job.shape.priority):
        by_priority.setdefault(outcome.job.shape.priority, []).append(1e3 * outcome.answer.first)
    tokens = sum(answer.tokens for answer in answers)
    prompt_tokens = sum(outcome.job.shape.prompt_tokens for outcome in outcomes)
    seconds = totals.seconds or 1.0  # nothing was answered
    cell = Cell(
        settings=dict(settings),
        rate=rate,
        requests=len(answers),
        refused=totals.refused,
        seconds=totals.seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        requests_per_second=len(answers) / seconds,
        ttft=spread(values["TTFT"]),
        tpot=spread(values["TPOT"]),
        itl=spread(values["ITL"]),
        e2e=spread(values["E2E"]),
        queue=spread([1e3 * outcome.queued for outcome in outcomes]),
        ttft_by_priority={priority: spread(found) for priority, found in by_priority.items()},
        utilisation=totals.busy / seconds / totals.devices,
        steps=totals.steps,
        rows_per_step=totals.rows / max(1, totals.steps),
        computed_tokens=totals.computed_tokens,
        wasted_rows=totals.wasted_rows,
        preemptions=sum(outcome.num_preemptions for outcome in outcomes),
        hit_rate=sum(outcome.num_cached_tokens for outcome in outcomes) / max(1, prompt_tokens),
        cache_used=totals.block_seconds / seconds / max(1, totals.blocks),
        in_system=totals.request_seconds / seconds,
    )
    return cell, values


def table(cells: Sequence[Cell]) -> str:
    """All cells in Markdown, one a line; latencies in milliseconds."""
    names = list(cells[0].settings)
    columns = ["tokens/s", "device", "rows", "cache", "preempted", "hits", "queue p50", "p99", "TTFT p50", "p99"]
    columns += ["TPOT p50", "p99", "ITL p99", "max", "E2E p50", "p99"]
    lines = [
        "| " + " | ".join([*names, "rate", *columns]) + " |",
        "|" + "--:|" * (len(names) + 1 + len(columns)),
    ]
    for cell in cells:
        entries = [f"{value}".lower() for value in cell.settings.values()]
        entries += [
            "file" if cell.rate is None else f"{cell.rate:g}",
            f"{cell.tokens_per_second:.0f}",
            f"{100 * cell.utilisation:.0f} %",
            f"{cell.rows_per_step:.0f}",
            f"{100 * cell.cache_used:.0f} %",
            f"{cell.preemptions}",
            f"{100 * cell.hit_rate:.0f} %",
            *_pair(cell.queue),
            *_pair(cell.ttft),
            *_pair(cell.tpot),
            *_tail(cell.itl),
            *_pair(cell.e2e),
        ]
        lines.append("| " + " | ".join(entries) + " |")
    lines += [f"\n{cell.refused} requests are too long for {_named(cell)}" for cell in cells if cell.refused]
    return "\n".join(lines)


def priorities(cells: Sequence[Cell]) -> str:
    """The first token by priority, in Markdown and milliseconds; nothing if all have the same."""
    if all(len(cell.ttft_by_priority) < 2 for cell in cells):
        return ""
    names = list(cells[0].settings)
    lines = [
        "| " + " | ".join([*names, "rate", "priority", "TTFT p50", "p99"]) + " |",
        "|" + "--:|" * (len(names) + 4),
    ]
    for cell in cells:
        for priority, found in cell.ttft_by_priority.items():
            entries = [f"{value}".lower() for value in cell.settings.values()]
            entries += ["file" if cell.rate is None else f"{cell.rate:g}", f"{priority}", *_pair(found)]
            lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines)


def write(title: str, cells: Sequence[Cell], values: Mapping[str, Sequence[float]], output: Path) -> list[Path]:
    """Write ``output`` with the endings .json and .svg, or one .svg of each latency if there are several cells.

    ``values`` are the latencies of the only cell.

    Raises:
        OSError: they cannot be written.
    """
    contents = {".json": msgspec.json.format(msgspec.json.encode(cells), indent=1).decode() + "\n"}
    if len(cells) == 1:
        contents[".svg"] = picture.curves(title, "ms", values)
    else:
        for name in PICTURED:
            contents[f".{name}.svg"] = _picture(title, name, cells)
    return result_files.write(output, contents)


def _picture(title: str, latency: str, cells: Sequence[Cell]) -> str:
    """The 99th percentile by rate, a line for each setting."""
    series: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        found: Spread | None = getattr(cell, latency)
        if found is not None:
            points = series.setdefault(", ".join(f"{value}".lower() for value in cell.settings.values()), [])
            points.append((cell.rate or 0.0, found.p99))
    names = ", ".join(cells[0].settings)
    return picture.lines(f"{title}: {latency.upper()} p99 by {names or 'rate'}", "ms", "/s", series)


def _named(cell: Cell) -> str:
    return ", ".join(f"{name} {value}".lower() for name, value in cell.settings.items()) or "this device"


def _tail(found: Spread | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{found.p99:.0f}", f"{found.max:.0f}")


def _pair(found: Spread | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{found.p50:.0f}", f"{found.p99:.0f}")
