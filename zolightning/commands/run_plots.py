"""Curves of several runs in one picture, as SVG for a page."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

# The colours of Okabe and Ito, which differ for the colour-blind, but for yellow, which is lost on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_DASHES = ("solid", "dashed", "dotted", "dashdot")  # of those that have a colour again
_TEXT, _GRID = "#444444", "#dddddd"
_LETTER = 10  # points from one letter at the end of a line to the next


@dataclass(frozen=True)
class Line:
    """A curve: `number` chooses its colour, and `letter` stands at its end."""

    number: int
    letter: str
    xs: Sequence[float]
    ys: Sequence[float]


def curves_svg(lines: Sequence[Line], x: str, y: str, mean_of: int = 1, from_zero: bool = False) -> str:
    """An ``<svg>`` element, whose texts are texts and which has no identifiers of groups that pages could hold twice.

    Args:
        lines: the curves.
        x: what the horizontal axis shows.
        y: what the curves show.
        mean_of: draw the mean of so many latest values, and the values themselves faintly behind it.
        from_zero: begin the vertical axis at 0.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zolightning", "font.size": 10}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")  # 317 units wide: as large as texts on a phone
        axes = figure.subplots()
        _style(axes, x, y)
        drawn = []
        for line in lines:
            color, dash = COLORS[line.number % len(COLORS)], _DASHES[line.number // len(COLORS) % len(_DASHES)]
            ys = line.ys
            if mean_of > 1:
                axes.plot(line.xs, ys, color=color, linewidth=0.8, alpha=0.25)
                ys = _means(ys, mean_of)
            marker = "o" if len(ys) <= 30 else None
            axes.plot(line.xs, ys, color=color, linestyle=dash, linewidth=1.6, marker=marker, markersize=3)
            drawn.append(replace(line, ys=ys))
        axes.margins(x=0.06)
        if from_zero:
            axes.set_ylim(bottom=0)
        figure.draw_without_rendering()  # makes the layout, which letters follow
        figure.set_layout_engine("none")
        _letters(axes, drawn, figure.dpi)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    label = f'<svg role="img" aria-label="{y} against {x}"'
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).replace("<svg", label, 1)


def _style(axes: Axes, x: str, y: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_TEXT)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT)
    axes.set_title(y, loc="left", fontsize=11)
    axes.set_xlabel(x, color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(_tick)


def _tick(value: float, position: float) -> str:
    """20k for 20,000; but 0.4 stays 0.4, not 400m, which a reader of minutes takes for minutes."""
    return EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:g}"


def _means(values: Sequence[float], count: int) -> list[float]:
    """At each value, the mean of the latest `count` values."""
    latest = (values[max(0, end - count) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in latest]


def _letters(axes: Axes, lines: Sequence[Line], dpi: float) -> None:
    """Writes each letter to the right of its line's end, above one that is there already."""
    placed: list[tuple[float, float]] = []
    ends = []
    for line in lines:
        finite = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
        if finite:
            x, y = axes.transData.transform(finite[-1]) * 72 / dpi
            ends.append((y, x, line))
    for y, x, line in sorted(ends, key=lambda end: end[:2]):
        place = y
        for there_x, there_y in placed:
            if abs(there_x - x) < _LETTER and place < there_y + _LETTER:
                place = there_y + _LETTER
        placed.append((x, place))
        axes.annotate(
            line.letter,
            (x, place),
            xycoords="figure points",
            xytext=(5, -3),
            textcoords="offset points",
            color=COLORS[line.number % len(COLORS)],
            fontweight="bold",
            annotation_clip=False,
        ).set_in_layout(False)
