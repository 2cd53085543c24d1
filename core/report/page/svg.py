"""Charts as inline SVG: lines, bars, bins and a matrix. Colours are those of page.css, so they follow light and dark.

Charts are drawn in a box of fixed units and scaled to the width that the page gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.report.page.html import Html, element

NUM_COLOUR = 6
Range = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart; points that are not finite interrupt it."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: int = 0
    dashed: bool = False
    marked: bool = False  # with a dot on every point


@dataclass(frozen=True)
class Frame:
    """The area of a chart: data ranges, and the box that they are drawn into."""

    x_range: Range
    y_range: Range
    width: int = 480
    height: int = 300
    left: int = 48
    bottom: int = 40
    top: int = 10
    right: int = 14

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.height - self.bottom - (value - low) / (high - low) * self.inner_height, 1)

    @property
    def inner_height(self) -> int:
        return self.height - self.bottom - self.top


def colour(index: int) -> str:
    """Return a colour of the page's palette."""
    return f"var(--c{index % NUM_COLOUR})"


def text(x: float, y: float, content: str, anchor: str = "start", **attributes: str | float) -> Html:
    return element("text", content, x=x, y=y, text_anchor=anchor, **attributes)


def chart(
    title: str,
    lines: Sequence[Line],
    frame: Frame,
    x_label: str = "",
    y_label: str = "",
    bins: Sequence[tuple[float, float, float]] = (),
    small: bool = False,
) -> Html:
    """Return a figure with lines over axes, and above it its title and the lines' names.

    bins: (left, right, height) of bars behind the lines. small: without names and labels, for many charts of one kind.
    """
    shapes = [_grid(frame, "", "", num_tick=2) if small else _grid(frame, x_label, y_label, num_tick=5)]
    for left, right, height in bins:
        x, y = frame.x(left), frame.y(height)
        size = {"width": max(0.0, frame.x(right) - x - 2), "height": max(0.0, frame.height - frame.bottom - y)}
        shapes.append(element("rect", x=x + 1, y=y, fill=colour(0), fill_opacity=0.35, **size))
    for line in lines:
        shapes += _draw(line, frame)
    keys = [_key(line) for line in lines if line.name and not small]
    heading = element("div", title, class_="chart-title")
    drawn = _svg(frame.width, frame.height, title, shapes)
    return element("figure", heading, element("figcaption", *keys) if keys else "", drawn)


def bars(title: str, rows: Sequence[tuple[str, float, str]], maximum: float, shade: int = 0) -> Html:
    """Return a figure of horizontal bars, (name, value, text beside it) each."""
    row_height, left, width = 26, 150, 480
    height = row_height * len(rows) + 8
    shapes = []
    for i, (name, value, label) in enumerate(rows):
        middle = 4 + row_height * i + row_height / 2
        length = round(max(0.0, value) / (maximum or 1) * (width - left - 100), 1)
        shapes += [
            text(left - 8, middle + 5, _shorten(name, 20), "end"),
            element("rect", x=left, y=middle - 8, width=max(1.0, length), height=16, fill=colour(shade)),
            text(left + length + 6, middle + 5, label),
        ]
    return element("figure", element("div", title, class_="chart-title"), _svg(width, height, title, shapes))


def matrix(title: str, values: np.ndarray, names: Sequence[str], row_title: str, column_title: str) -> Html:
    """Return a figure of a square matrix (n, n) of counts, shaded by their share of the row."""
    n = len(names)
    cell, left, top = max(28, min(46, 620 // n)), 128, 130
    width, height = left + cell * n + 60, top + cell * n + 8  # the last name leans over the right edge
    share = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    shapes = [
        text(8, 18, f"rows: {row_title}", class_="axis"),
        text(8, 36, f"columns: {column_title}", class_="axis"),
    ]
    for i, name in enumerate(names):
        middle = cell * i + cell / 2
        x, y = left + middle, top + middle
        shapes.append(text(left - 8, y + 5, _shorten(name, 16), "end"))
        shapes.append(text(x + 4, top - 8, _shorten(name, 16), transform=f"rotate(-60 {x + 4} {top - 8})"))
    for i, j in np.ndindex(n, n):
        x, y = left + cell * j, top + cell * i
        count, part = int(values[i, j]), float(share[i, j])
        fill = {"fill": f"rgba(var(--heat), {0.06 + 0.6 * part:.2f})"} if count else {"fill": "none"}
        shapes.append(element("rect", x=x, y=y, width=cell - 1, height=cell - 1, stroke="var(--rule)", **fill))
        if count:
            shapes.append(text(x + cell / 2, y + cell / 2 + 4, _compact(count), "middle", font_size=12))
    drawn = _svg(width, height, title, shapes, style=f"max-width: {width}px; min-width: {min(width, 600)}px")
    return element("figure", element("div", title, class_="chart-title"), element("div", drawn, class_="wide"))


def nice_top(values: Sequence[float] | np.ndarray) -> float:
    """Return a round number at or above all finite values."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    unit = 10.0 ** math.floor(math.log10(top))
    return next(step * unit for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * unit >= top * (1 - 1e-9))


def _svg(width: float, height: float, title: str, shapes: Sequence[Html], **attributes: str) -> Html:
    return element("svg", *shapes, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title, **attributes)


def _grid(frame: Frame, x_label: str, y_label: str, num_tick: int) -> Html:
    shapes = []
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    for value in np.linspace(*frame.y_range, num_tick + 1).tolist():
        y = frame.y(value)
        shapes.append(element("line", x1=frame.left, x2=right, y1=y, y2=y, class_="grid"))
        shapes.append(text(frame.left - 6, y + 4, f"{value:.4g}", "end", class_="axis"))
    for value in np.linspace(*frame.x_range, num_tick + 1).tolist():
        x = frame.x(value)
        shapes.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="grid"))
        shapes.append(text(x, bottom + 17, f"{value:.4g}", "middle", class_="axis"))
    if x_label:
        shapes.append(text((frame.left + right) / 2, frame.height - 4, x_label, "middle", class_="axis"))
    if y_label:
        middle = (frame.top + bottom) / 2
        shapes.append(text(12, middle, y_label, "middle", class_="axis", transform=f"rotate(-90 12 {middle})"))
    return element("g", *shapes)


def _draw(line: Line, frame: Frame) -> list[Html]:
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    defined = np.isfinite(x) & np.isfinite(y)
    y = np.clip(np.where(defined, y, 0), *frame.y_range)
    points = [(frame.x(a), frame.y(b)) if ok else None for a, b, ok in zip(x, y, defined, strict=True)]
    steps, pen_down = [], False
    for point in points:
        if point is not None:
            steps.append(f"{'L' if pen_down else 'M'}{point[0]:g} {point[1]:g}")
        pen_down = point is not None
    shapes = []
    if steps:
        style = "line dashed" if line.dashed else "line"
        shapes.append(element("path", d="".join(steps), stroke=colour(line.colour), class_=style))
    if line.marked:
        shapes += [element("circle", cx=p[0], cy=p[1], r=3.5, fill=colour(line.colour)) for p in points if p]
    return shapes


def _key(line: Line) -> Html:
    mark = element("i", style=f"border-color: {colour(line.colour)}", class_="dashed" if line.dashed else "solid")
    return element("span", mark, line.name, class_="key")


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _compact(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 10**6 else f"{count / 10**6:.1f}M"
