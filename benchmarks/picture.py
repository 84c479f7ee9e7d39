"""Charts as SVG text, one colour for each series: groups of bars, curves over percentiles, and lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = ("#2563eb", "#f59e0b", "#6b7280", "#10b981", "#dc2626", "#7c3aed")
LEGEND = 110  # pixels of each name
BAR, GAP, HEIGHT, TOP, LEFT = 34, 30, 240, 60, 20  # pixels
WIDTH, MARGIN = 560, 64  # of curves, and where their numbers stand
POINTS = 400  # of a curve at most


def bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """Draw ``series``, each with a number for every group; None leaves a bar out. All share one scale."""
    highest = max((value for values in series.values() for value in values if value is not None), default=0) or 1
    group_width = len(series) * BAR + GAP
    width, base = 2 * LEFT + len(groups) * group_width, TOP + HEIGHT
    parts = head(title, series, width, base + 40)
    for place, group in enumerate(groups):
        left = LEFT + place * group_width
        middle = left + len(series) * BAR / 2
        parts.append(f'<text x="{middle:.0f}" y="{base + 18}" text-anchor="middle">{escape(group)}</text>')
        for number, values in enumerate(series.values()):
            if (value := values[place]) is not None:
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


def curves(title: str, unit: str, series: Mapping[str, Sequence[float]]) -> str:
    """Draw each of ``series`` ordered: at 90 on the way right stands what 90 % of its values do not exceed.

    All share one logarithmic scale; values below a thousandth of the largest lie on its lower edge.
    """
    drawn = {name: sorted(values) for name, values in series.items() if values}
    points = {
        name: [(place, values[round(place * (len(values) - 1))]) for place in _places(len(values))]
        for name, values in drawn.items()
    }
    shares = {share / 100: f"{share} %" for share in (0, 25, 50, 75, 90, 100)}
    return _on_log_scale(title, unit, shares, points)


def lines(title: str, unit: str, x_unit: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw each of ``series`` from point to point, (x, y): x from 0 on, y on one logarithmic scale as of ``curves``."""
    xs = sorted({x for points in series.values() for x, _ in points})
    widest = max(xs, default=1.0) or 1.0
    drawn = {name: [(x / widest, y) for x, y in points] for name, points in series.items() if points}
    return _on_log_scale(title, unit, {x / widest: f"{x:g}{x_unit}" for x in xs}, drawn)


def _places(count: int) -> list[float]:
    """Where ``count`` values are looked at, from 0 to 1."""
    steps = min(POINTS, max(2, count))
    return [i / (steps - 1) for i in range(steps)]


def _on_log_scale(
    title: str, unit: str, ticks: Mapping[float, str], series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """Draw points whose x lies between 0 and 1, with names at some of these."""
    values = [y for points in series.values() for _, y in points]
    highest = max(values, default=1.0) or 1.0
    lowest = max(highest / 1000, min(values, default=1.0))
    bottom, top = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    top = max(top, bottom + 1)
    base = TOP + HEIGHT
    parts = head(title, series, max(MARGIN + WIDTH + LEFT, LEFT + len(series) * LEGEND), base + 40)

    def y(value: float) -> float:
        return base - (math.log10(max(value, 10**bottom)) - bottom) / (top - bottom) * HEIGHT

    for power in range(bottom, top + 1):
        line = y(10**power)
        parts.append(f'<line x1="{MARGIN}" y1="{line:.1f}" x2="{MARGIN + WIDTH}" y2="{line:.1f}" stroke="#e5e7eb"/>')
        label = f"{10**power:g} {escape(unit)}"
        parts.append(f'<text x="{MARGIN - 6}" y="{line + 4:.1f}" text-anchor="end">{label}</text>')
    for place, name in ticks.items():
        x = MARGIN + place * WIDTH
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{base}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{escape(name)}</text>')
    for number, points in enumerate(series.values()):
        path = " ".join(f"{MARGIN + x * WIDTH:.1f},{y(value):.1f}" for x, value in points)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


def head(title: str, names: Iterable[str], width: int, height: int) -> list[str]:
    """The beginning of a picture: its paper, title and legend."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, name in enumerate(names):
        x = LEFT + number * LEGEND
        parts.append(f'<rect x="{x}" y="30" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 15}" y="39">{escape(name)}</text>')
    return parts
