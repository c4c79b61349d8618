"""Line charts as SVG: in a page, colored by its style sheet, or as a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 44
# Colors of the style sheet: .s0 to .s7.
COLORS = 8
# Colors of a file that no style sheet reaches.
IMAGE_STYLE = (
    "text{font:11px sans-serif;fill:#808080}line{stroke:#808080;stroke-opacity:.4}"
    "polyline{fill:none;stroke:#3b82f6;stroke-width:2}circle{fill:#3b82f6}"
)


@dataclass(frozen=True)
class Line:
    """Points that are joined.

    Attributes:
        name: in the legend.
        points: x, y.
        color: number of the style sheet's color.
        dashed: for a baseline.
        labels: beside the points; none by default.
        notes: added to the points' tooltips; none by default.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False
    labels: Sequence[str] = ()
    notes: Sequence[str] = ()


def line_chart(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    powers: bool = False,
    whole: bool = False,
    top: float | None = None,
    level: float | None = None,
) -> str:
    """A chart with its legend.

    Args:
        lines: with at least one point in all.
        x_title, y_title: with units.
        powers: x grows by factors of two.
        whole: x takes whole numbers, and each has a tick.
        top: upper end of y; found by default.
        level: y of a horizontal line to compare with.
    """
    if not any(line.points for line in lines):
        return '<p class="none">Nothing was measured for this chart.</p>'
    plot = _plot(lines, x_title, y_title, powers=powers, whole=whole, top=top, level=level)
    return f'<p class="ytitle">{escape(y_title)}</p>{plot}{_legend(lines)}'


def line_image(lines: Sequence[Line], x_title: str, y_title: str) -> str:
    """A chart as the content of an SVG file, readable on light and dark pages.

    Args:
        lines: with at least one point in all.
        x_title, y_title: with units.
    """
    plot = _plot(lines, x_title, y_title)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
    return plot.replace("<svg ", head, 1).replace(">", f"><style>{IMAGE_STYLE}</style>", 1) + "\n"


def _plot(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    powers: bool = False,
    whole: bool = False,
    top: float | None = None,
    level: float | None = None,
) -> str:
    points = [point for line in lines for point in line.points]
    xs = sorted({x for x, _ in points})
    high = top or _round_up(max([y for _, y in points] + [level or 0.0]))
    if powers or whole:
        low_x, high_x, x_ticks = xs[0], xs[-1], xs
    else:
        low_x, high_x = 0.0, _round_up(xs[-1])
        x_ticks = _ticks(high_x)
    scale: Callable[[float], float] = math.log2 if powers else float
    span = scale(high_x) - scale(low_x)

    def across(x: float) -> float:
        share = (scale(x) - scale(low_x)) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - min(y / high, 1.0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_title)} against {escape(x_title)}">'
    ]
    for y in _ticks(high):
        parts.append(_line(LEFT, down(y), WIDTH - RIGHT, down(y), "grid"))
        parts.append(_text(LEFT - 6, down(y) + 4, _number(y), "end"))
    if level is not None:
        parts.append(_line(LEFT, down(level), WIDTH - RIGHT, down(level), "level"))
    for x in x_ticks:
        parts.append(_text(across(x), HEIGHT - BOTTOM + 17, _number(x), "middle"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 6, x_title, "middle", "title"))
    for line in lines:
        pixels = [(across(x), down(y)) for x, y in line.points]
        notes = [*(f", {note}" for note in line.notes), *[""] * len(pixels)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        style = f"s{line.color % COLORS}" + (" dashed" if line.dashed else "")
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        for (x, y), (value_x, value_y), note in zip(pixels, line.points, notes, strict=False):
            tip = f"{line.name}: {_number(value_x)}, {value_y:.4g}{note}"
            parts.append(
                f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                f"<title>{escape(tip)}</title></circle>"
            )
        for (x, y), label in zip(pixels, line.labels, strict=False):
            parts.append(_text(x + 5, y - 6, label, "start"))
    return "".join([*parts, "</svg>"])


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><i class="s{line.color % COLORS}{" dashed" if line.dashed else ""}"></i>'
        f"{escape(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    factors = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return next(f * power for f in factors if f * power >= value * (1 - 1e-9))


def _ticks(high: float) -> list[float]:
    parts = next(n for n in (4, 5, 3, 2) if n == 2 or _is_round(high / n))
    return [high * n / parts for n in range(parts + 1)]


def _is_round(value: float) -> bool:
    return math.isclose(value, float(f"{value:.2g}"))


def _number(value: float) -> str:
    if value >= 10000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
