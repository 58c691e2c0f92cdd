"""Charts as SVG text that stands inside a page and takes its colours from it."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

_WIDTH, _HEIGHT = 620, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44


@dataclasses.dataclass(frozen=True, eq=False)
class Chart:
    """A scatter plot of the cases.

    Attributes:
      x, y: per case. passed: per case. x_title, y_title, title: in words.
      x_lines, y_lines: positions of the thresholds.
    """

    title: str
    x_title: str
    y_title: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    passed: tuple[bool, ...]
    x_lines: tuple[float, ...] = ()
    y_lines: tuple[float, ...] = ()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(chart: Chart, labels: Sequence[str]) -> str:
    """A point for each case, its label shown under the mouse; thresholds as dashed lines."""
    if not chart.x:
        return ""
    x_low, x_high = _padded([*chart.x, *chart.x_lines])
    y_low, y_high = _padded([*chart.y, *chart.y_lines])
    place_x, place_y = _axes(x_low, x_high, y_low, y_high)
    parts = [_frame(ticks(x_low, x_high), ticks(y_low, y_high), place_x, place_y, chart.x_title, chart.y_title)]
    parts += [_line("limit", place_x(x), _TOP, place_x(x), _HEIGHT - _BOTTOM) for x in chart.x_lines]
    parts += [_line("limit", _LEFT, place_y(y), _WIDTH - _RIGHT, place_y(y)) for y in chart.y_lines]
    for x, y, passed, label in zip(chart.x, chart.y, chart.passed, labels, strict=True):
        name = "good" if passed else "bad"
        parts.append(
            f'<circle class="{name}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="4.5">'
            f"<title>{html.escape(label)}</title></circle>"
        )
    return _svg(parts, chart.title)


def curve(points: Sequence[tuple[float, float]], x_title: str, y_title: str) -> str:
    """A line over positive values, logarithmic upwards, with the raw values faint behind their running mean."""
    points = [(x, y) for x, y in points if y > 0]
    if len(points) < 2:
        return ""
    logs = [math.log10(y) for _, y in points]
    y_low, y_high = _padded(logs)
    place_x, place_y = _axes(min(x for x, _ in points), max(x for x, _ in points), y_low, y_high)
    marks = [m * 10.0**e for e in range(math.floor(y_low), math.ceil(y_high) + 1) for m in (1, 2, 5)]
    marks = [math.log10(mark) for mark in marks if y_low <= math.log10(mark) <= y_high]
    parts = [
        _frame(
            ticks(points[0][0], points[-1][0]),
            marks,
            place_x,
            place_y,
            x_title,
            y_title,
            lambda v: f"{10**v:g}",
        )
    ]
    smooth, mean = [], logs[0]
    for (x, _), value in zip(points, logs, strict=True):
        mean += (value - mean) * 0.2
        smooth.append((x, mean))
    for name, line in (("raw", [(x, v) for (x, _), v in zip(points, logs)]), ("mean", smooth)):
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
    return _svg(parts, y_title)


def shares(points: Mapping[float, float], needed: float, x_title: str) -> str:
    """A line through shares of 0 to 1 over a scale, with the one that is needed dashed."""
    place_x, place_y = _axes(*_padded(list(points)), -0.02, 1.02)
    marks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [_frame(list(points), marks, place_x, place_y, x_title, "share", lambda v: f"{v:.0%}")]
    parts.append(_line("limit", _LEFT, place_y(needed), _WIDTH - _RIGHT, place_y(needed)))
    path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points.items())
    return _svg([*parts, f'<polyline class="mean" points="{path}"/>'], f"share over {x_title}")


def line(
    points: Sequence[tuple[float, float, float, float]],
    limits: Mapping[str, float],
    x_title: str,
    y_title: str,
    name_y: Callable[[float], str] = lambda v: f"{v:g}",
) -> str:
    """A line through (x, y, low, high) with the interval as an upright line at each point.

    Args:
      limits: values that are drawn as dashed lines, by name, which is shown under the mouse.
    """
    finite = [v for point in points for v in point[1:] if math.isfinite(v)]
    y_low, y_high = _padded([*finite, *limits.values()])
    place_x, place_y = _axes(*_padded([x for x, *_ in points]), y_low, y_high)
    parts = [_frame([x for x, *_ in points], ticks(y_low, y_high), place_x, place_y, x_title, y_title, name_y)]
    for name, value in limits.items():
        drawn = _line("limit", _LEFT, place_y(value), _WIDTH - _RIGHT, place_y(value))
        parts.append(f"<g><title>{html.escape(name)}</title>{drawn}</g>")
    for x, _, low, high in points:
        if math.isfinite(low):
            parts.append(_line("raw", place_x(x), place_y(low), place_x(x), place_y(high)))
    path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y, *_ in points)
    return _svg([*parts, f'<polyline class="mean" points="{path}"/>'], f"{y_title} over {x_title}")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def _axes(
    x_low: float, x_high: float, y_low: float, y_high: float
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return (
        lambda x: _LEFT + wide * (x - x_low) / max(x_high - x_low, 1e-12),
        lambda y: _TOP + tall * (y_high - y) / max(y_high - y_low, 1e-12),
    )


def _frame(
    x_ticks: Iterable[float],
    y_ticks: Iterable[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    x_title: str,
    y_title: str,
    name_y: Callable[[float], str] = lambda v: f"{v:g}",
) -> str:
    bottom, middle, centre = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts = []
    for x in x_ticks:
        parts.append(_line("tick", place_x(x), _TOP, place_x(x), bottom))
        parts.append(f'<text x="{place_x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    for y in y_ticks:
        parts.append(_line("tick", _LEFT, place_y(y), _WIDTH - _RIGHT, place_y(y)))
        parts.append(f'<text x="{_LEFT - 7}" y="{place_y(y) + 4:.1f}" text-anchor="end">{name_y(y)}</text>')
    for place, title in (
        (f"translate({middle} {_HEIGHT - 8})", x_title),
        (f"translate(13 {centre}) rotate(-90)", y_title),
    ):
        parts.append(f'<text class="axis" transform="{place}" text-anchor="middle">{html.escape(title)}</text>')
    return "".join(parts)


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(parts: list[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
