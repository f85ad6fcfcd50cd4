"""Line plots as SVG text, for benchmarks: no plotting library is a dependency."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#555555")
_WIDTH, _HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 40, 92
_MAX_DOTS = 16  # a line of more points is drawn without dots


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; `points` are (x, y) in order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. y starts at 0, or spans decades with `log_y`; `x_ticks` are (x, text) of
    an axis of names."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = field(default_factory=list)
    log_y: bool = False
    x_ticks: Sequence[tuple[float, str]] = ()


def draw(panels: Sequence[Panel], *, caption: str) -> str:
    """Panels side by side over a caption."""
    width = _WIDTH * len(panels)
    body = "".join(
        f'<g transform="translate({index * _WIDTH},0)">{_panel(panel)}</g>'
        for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT + 24}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{body}'
        f"{_text(width / 2, _HEIGHT + 14, caption, anchor='middle')}</svg>\n"
    )


def _panel(panel: Panel) -> str:
    points = [point for line in panel.lines for point in line.points]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    ticks = _decades(points) if panel.log_y else _ticks(0.0, max(p[1] for p in points))
    low, high = ticks[0], ticks[-1]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place_x(x: float) -> float:
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1.0) * (right - _LEFT)

    def place_y(y: float) -> float:
        if panel.log_y:
            share = math.log10(max(y, low) / low) / (math.log10(high / low) or 1.0)
        else:
            share = (y - low) / ((high - low) or 1.0)
        return bottom - share * (bottom - _TOP)

    parts = [_text(_LEFT, 20, panel.title, weight="bold")]
    for tick in ticks:
        y = place_y(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 5, y + 4, _short(tick), anchor="end"))
    x_ticks = panel.x_ticks or [(tick, _short(tick)) for tick in _ticks(x_low, x_high)]
    for x, text in x_ticks:
        if x_low <= x <= x_high:
            parts.append(_text(place_x(x), bottom + 15, text, anchor="middle"))
    parts.append(_text((_LEFT + right) / 2, bottom + 31, panel.x_label, anchor="middle"))
    parts.append(
        f'<g transform="translate(14,{(_TOP + bottom) / 2}) rotate(-90)">'
        f"{_text(0, 0, panel.y_label, anchor='middle')}</g>"
    )
    for index, line in enumerate(panel.lines):
        colour = _COLOURS[index % len(_COLOURS)]
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        places = [(place_x(x), place_y(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'
        )
        if len(places) <= _MAX_DOTS:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places
            ]
        legend_x, legend_y = _LEFT + 190 * (index % 2), bottom + 48 + 14 * (index // 2)
        parts.append(
            f'<path d="M{legend_x} {legend_y - 4}h18" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts.append(_text(legend_x + 23, legend_y, line.label))
    return "".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{html.escape(text)}</text>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover [low, high]."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first = math.floor(low / step + 1e-9)
    return [step * number for number in range(first, math.ceil(high / step - 1e-9) + 1)]


def _decades(points: Sequence[tuple[float, float]]) -> list[float]:
    values = [y for _, y in points if y > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def _short(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:.3g}"
