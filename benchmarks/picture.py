"""A bar chart as SVG text: groups of bars, one colour for each series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#2563eb", "#f59e0b", "#6b7280", "#10b981")
BAR, GAP, HEIGHT, TOP, LEFT = 34, 30, 240, 60, 20  # pixels


def bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """Draw ``series``, each with a number for every group; None leaves a bar out. All share one scale."""
    highest = max((value for values in series.values() for value in values if value is not None), default=0) or 1
    group_width = len(series) * BAR + GAP
    width, base = 2 * LEFT + len(groups) * group_width, TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{base + 40}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{base + 40}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, name in enumerate(series):
        x = LEFT + number * 110
        parts.append(f'<rect x="{x}" y="30" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 15}" y="39">{escape(name)}</text>')
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
