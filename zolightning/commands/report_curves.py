"""Curves of several runs in one picture, as SVG for a page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from string import ascii_uppercase
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

# The colours of Okabe and Ito, which differ for the colour-blind, but for yellow, which is lost on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_DASHES = ("solid", "dashed", "dotted", "dashdot")  # for curves that reuse a colour
_TEXT = "#444444"
_STYLE: Any = {
    "svg.fonttype": "none",  # texts are texts
    "svg.hashsalt": "zolightning",
    "text.parse_math": False,  # a dollar in a metric's name is a dollar
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
}


@dataclass(frozen=True)
class Line:
    """A curve; `number` chooses its letter, colour and dashes."""

    number: int
    xs: Sequence[float]
    ys: Sequence[float]


def curves_svg(lines: Sequence[Line], x: str, y: str, mean_of: int = 1, from_zero: bool = False) -> str:
    """An ``<svg>`` element whose text stays text, without ids of groups, which would be in the page more than once.

    Args:
        lines: the curves.
        x: what the horizontal axis shows.
        y: what the curves show.
        mean_of: draw the mean of so many latest values, and the values themselves faintly behind it.
        from_zero: begin the vertical axis at 0.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")  # 317 units wide: as large as texts on a phone
        axes = figure.subplots()
        axes.set(title=y, xlabel=x)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(_tick)
        for line in lines:
            color, dash = COLORS[line.number % len(COLORS)], _DASHES[line.number // len(COLORS) % len(_DASHES)]
            ys = line.ys
            if mean_of > 1:
                axes.plot(line.xs, ys, color=color, linewidth=0.8, alpha=0.25)
                ys = _means(ys, mean_of)
            marker, letter = "o" if len(ys) <= 30 else None, ascii_uppercase[line.number]
            axes.plot(line.xs, ys, color=color, linestyle=dash, marker=marker, label=letter)
        axes.legend(ncols=-(-len(lines) // 5), handlelength=1.6)
        if from_zero:
            axes.set_ylim(bottom=0)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    label = f'<svg role="img" aria-label="{escape(y)} against {x}"'
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).replace("<svg", label, 1)


def _tick(value: float, position: float) -> str:
    """20k for 20,000; but 0.4 stays 0.4, not 400m, which a reader of minutes takes for minutes."""
    return EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:g}"


def _means(values: Sequence[float], count: int) -> list[float]:
    """At each value, the mean of the latest `count` values."""
    latest = (values[max(0, end - count) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in latest]
