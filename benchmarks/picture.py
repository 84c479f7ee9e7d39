"""Charts as SVG text, one colour for each series: groups of bars, curves over percentiles, and lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from benchmarks.latency import place

COLOURS = ("#2563eb", "#f59e0b", "#6b7280", "#10b981", "#dc2626", "#7c3aed")
LEGEND = 110  # pixels of each name
BAR, GAP, HEIGHT, TOP, LEFT = 34, 30, 240, 78, 20  # pixels
WIDTH, MARGIN, RIGHT = 560, 64, 96  # of curves, and where their numbers and the names of limits stand
POINTS = 400  # of a curve at most, about


def bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """Draw ``series``, each with a number for every group; None leaves a bar out. All share one scale."""
    highest = max((value for values in series.values() for value in values if value is not None), default=0) or 1
    group_width = len(series) * BAR + GAP
    width, base = 2 * LEFT + len(groups) * group_width, TOP + HEIGHT
    parts = head(title, series, width, base + 40)
    for at, group in enumerate(groups):
        left = LEFT + at * group_width
        middle = left + len(series) * BAR / 2
        parts.append(f'<text x="{middle:.0f}" y="{base + 18}" text-anchor="middle">{escape(group)}</text>')
        for number, values in enumerate(series.values()):
            if (value := values[at]) is not None:
                parts += bar(left + number * BAR, base, value, value / highest * HEIGHT, COLOURS[number % len(COLOURS)])
    return "\n".join(
        [*parts, f'<line x1="{LEFT}" y1="{base}" x2="{width - LEFT}" y2="{base}" stroke="black"/>', "</svg>", ""]
    )


def bar(x: float, base: float, value: float, height: float, colour: str) -> list[str]:
    """One bar with its number on it."""
    return [
        f'<rect x="{x + 2}" y="{base - height:.1f}" width="{BAR - 4}" height="{height:.1f}" fill="{colour}"/>',
        f'<text x="{x + BAR / 2}" y="{base - height - 4:.1f}" text-anchor="middle">{value:.0f}</text>',
    ]


def curves(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[float]],
    *,
    about: str = "",
    limits: Mapping[str, float] | None = None,
) -> str:
    """Draw each of ``series`` ordered: at 90 on the way right stands its 90th percentile, as ``latency`` has it.

    All share one logarithmic scale; values below a thousandth of the largest lie on its lower edge. ``about`` is a
    second line under the title, and ``limits`` are dashed lines, by the names of their series.
    """
    drawn = {name: _steps(sorted(values)) for name, values in series.items() if values}
    ticks = {share / 100: f"{share} %" for share in (0, 25, 50, 75, 90, 100)}
    x_title = "share of values that are no larger"
    return _on_log_scale((title, about), unit, ticks, x_title, drawn, limits or {})


def lines(title: str, unit: str, x_unit: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw each of ``series`` from point to point, (x, y): x from 0 on, y on one logarithmic scale as of ``curves``."""
    xs = sorted({x for points in series.values() for x, _ in points})
    widest = max(xs, default=1.0) or 1.0
    drawn = {name: [(x / widest, y) for x, y in points] for name, points in series.items() if points}
    return _on_log_scale((title, ""), unit, {x / widest: f"{x:g}{x_unit}" for x in xs}, "", drawn, {})


def _steps(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the percentiles of ordered ``values``: each one's step, or of many as many as are seen."""
    count = len(values)
    if 2 * count > POINTS:
        return [(i / POINTS, values[place(i / POINTS, count)]) for i in range(POINTS + 1)]
    return [(side / count, value) for i, value in enumerate(values) for side in (i, i + 1)]


def _on_log_scale(
    titles: tuple[str, str],
    unit: str,
    ticks: Mapping[float, str],
    x_title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    limits: Mapping[str, float],
) -> str:
    """Draw points whose x lies between 0 and 1, with names at some of these."""
    values = [*(y for points in series.values() for _, y in points), *limits.values()]
    highest = max(values, default=1.0) or 1.0
    lowest = max(highest / 1000, min(values, default=1.0))
    bottom, top = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    top = max(top, bottom + 1)
    base = TOP + HEIGHT
    names = list(dict.fromkeys((*series, *limits)))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    width = max(MARGIN + WIDTH + RIGHT, LEFT + len(names) * LEGEND)
    parts = head(titles[0], names, width, base + 60, titles[1])

    def y(value: float) -> float:
        return base - (math.log10(max(value, 10**bottom)) - bottom) / (top - bottom) * HEIGHT

    for power in range(bottom, top + 1):
        parts.append(_line(MARGIN, y(10**power), MARGIN + WIDTH, y(10**power), 'stroke="#e5e7eb"'))
        label = f"{10**power:g} {escape(unit)}"
        parts.append(f'<text x="{MARGIN - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">{label}</text>')
    for share, name in ticks.items():
        x = MARGIN + share * WIDTH
        parts.append(_line(x, TOP, x, base, 'stroke="#e5e7eb"'))
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{escape(name)}</text>')
    if x_title:
        middle = f'x="{MARGIN + WIDTH / 2:.0f}" y="{base + 40}" text-anchor="middle"'
        parts.append(f"<text {middle}>{escape(x_title)}</text>")
    for name, limit in limits.items():
        parts.append(
            _line(MARGIN, y(limit), MARGIN + WIDTH, y(limit), f'stroke="{colours[name]}" stroke-dasharray="6 4"')
        )
        label = f"{escape(name)} {limit:g} {escape(unit)}"
        parts.append(f'<text x="{MARGIN + WIDTH + 4}" y="{y(limit) + 4:.1f}" fill="{colours[name]}">{label}</text>')
    for name, points in series.items():
        path = " ".join(f"{MARGIN + x * WIDTH:.1f},{y(value):.1f}" for x, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {stroke}/>'


def head(title: str, names: Iterable[str], width: int, height: int, about: str = "") -> list[str]:
    """The beginning of a picture: its paper, title, what it is about, and legend."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    if about:
        parts.append(f'<text x="{LEFT}" y="38">{escape(about)}</text>')
    for number, name in enumerate(names):
        x, y = LEFT + number * LEGEND, 48
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 15}" y="{y + 9}">{escape(name)}</text>')
    return parts
