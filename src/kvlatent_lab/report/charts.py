"""The charts of the page: lines with errors and bands, and dots in rows. Small enough for a phone, legends outside.

A legend is HTML, so that its text wraps and scales with the page; the picture holds data, axes and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from kvlatent_lab.report.page_listings import plain
from kvlatent_lab.report.svg import ROLES, embedded

__all__ = ["MOST_LINES", "Chart", "Line", "dot_chart", "line_chart", "points"]

MOST_LINES = 6
_WIDTH, _HEIGHT = 5.0, 3.1  # inches of 72 units: a phone shows about one unit a pixel
_MARKS = {"c1": "o", "c2": "s", "c3": "^", "c4": "D", "c5": "v", "muted": "x", "original": "o"}
_DASHES = (0, (4, 3))
_MOST_TICKS = 7
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvlatent",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 9,
    "text.color": ROLES["ink"],
    "grid.linewidth": 0.7,
    "lines.markersize": 5,
    **dict.fromkeys(
        ("axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), ROLES["muted"]
    ),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), ROLES["rule"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
}


@dataclass(frozen=True)
class Line:
    """One line: `points` of :func:`points`, a role of colour (none: the next free one).

    `steps` draws level pieces, for what is of a layer and has no values between two of them.
    """

    label: str
    points: pd.DataFrame
    role: str = ""
    dashed: bool = False
    marks: bool = True
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture as SVG, and its legend: label, role, whether dashed, mark."""

    svg: str
    legend: Sequence[tuple[str, str, bool, str]] = ()


def points(x: Any, y: Any, error: Any = None, lower: Any = None, upper: Any = None) -> pd.DataFrame:
    """Numbers of a line, by x in order: y, its error, and the ends of a band around it; NaN or None where there is none."""
    columns = {"y": y, "error": error, "lower": lower, "upper": upper}
    listed = {name: np.nan if each is None else list(each) for name, each in columns.items()}
    frame = pd.DataFrame(listed, index=pd.Index(list(x), dtype=float), dtype=float)
    return frame[frame["y"].notna() & ~frame.index.duplicated(keep="last")].sort_index()


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    at_points: bool = False,
    level: float | None = None,
) -> Chart:
    """Draw lines over one pair of axes.

    Args:
        name: of the chart, its own on the page.
        lines: at most `MOST_LINES`; all of them are in the legend if there are two or more.
        title: for a screen reader.
        x_label, y_label: with their units; the second stands over the axis, level.
        log_x, log_y: logarithmic axes, kept where no x is negative and every y above 0.
        at_points: name the x axis at the points, as far as there is room; else where matplotlib would.
        level: draw a level line there (what the original has).
    """
    free = [role for role in list(_MARKS)[:-1] if role not in {line.role for line in lines}]
    roles = [line.role or (free.pop(0) if free else "muted") for line in lines]
    with _axes(_HEIGHT) as axes:
        if level is not None:
            axes.axhline(level, color=ROLES["original"], linewidth=1.2, linestyle=_DASHES)
        for line, role in zip(lines, roles, strict=True):
            _draw(axes, line, ROLES[role], _MARKS[role])
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        every = pd.concat([line.points for line in lines])
        _scale(axes.xaxis, every.index, log_x and bool((every.index >= 0).all()))
        _scale(axes.yaxis, every["y"], log_y and bool((every["y"] > 0).all()))
        if at_points:
            axes.xaxis.set_major_locator(ticker.FixedLocator(sorted(set(every.index)), nbins=_MOST_TICKS))
            axes.xaxis.set_major_formatter(lambda x, _: _short(x))
        _place(axes, y_label)
        svg = embedded(axes.figure, name, title)
    marks = [_MARKS[role] if line.marks else "" for line, role in zip(lines, roles, strict=True)]
    dashed = [line.dashed for line in lines]
    legend = list(zip([line.label for line in lines], roles, dashed, marks, strict=True))
    return Chart(svg, legend if len(lines) > 1 else ())


def _draw(axes: Any, line: Line, colour: str, mark: str) -> None:
    x, band = line.points.index, line.points[["lower", "upper"]].dropna()
    if len(band):
        axes.fill_between(band.index, band["lower"], band["upper"], color=colour, alpha=0.14, linewidth=0)
    axes.errorbar(
        x,
        line.points["y"],
        yerr=line.points["error"] if line.points["error"].notna().any() else None,
        color=colour,
        linestyle=_DASHES if line.dashed else "-",
        linewidth=1.2 if len(x) > 60 else 1.7,
        marker=mark if line.marks else "",
        drawstyle="steps-mid" if line.steps else "default",
        elinewidth=1.1,
        capsize=2.5,
    )


def dot_chart(
    name: str,
    dots: pd.DataFrame,
    *,
    title: str,
    x_label: str,
    log_x: bool = False,
    level: float | None = None,
) -> Chart:
    """Draw one dot a row of `dots` (its label, "y" and "error"), the first on top; long labels are broken."""
    labels = ["\n".join(wrap(label, 60)) for label in dots.index]
    rows, height = [], 0.0
    for label in reversed(labels):  # from the axis upwards; a row is its dot and above it its label
        rows.insert(0, height)
        height += 1.4 + 0.5 * label.count("\n")
    with _axes(0.6 + 0.3 * height) as axes:
        if level is not None:
            axes.axvline(level, color=ROLES["original"], linewidth=1.2, linestyle=_DASHES)
        axes.errorbar(
            dots["y"], rows, xerr=dots["error"].fillna(0.0), fmt="o", color=ROLES["c1"], elinewidth=1.1
        )
        for y, label in zip(rows, labels, strict=True):
            axes.annotate(label, (0, y + 0.4), xycoords=("axes fraction", "data"), fontsize=8.5, va="bottom")
        axes.set_ylim(-0.6, height - 0.2)
        axes.set_xlabel(x_label)
        axes.grid(axis="x")
        _scale(axes.xaxis, dots["y"], log_x)
        axes.set_yticks([])
        _place(axes, "")
        svg = embedded(axes.figure, name, title)
    return Chart(svg)


@contextmanager
def _axes(height: float) -> Generator[Any]:
    """Axes in the page's style, alone in a figure: no frame, and no tick lines beside names of y."""
    with matplotlib.rc_context(_STYLE):
        axes = Figure(figsize=(_WIDTH, height)).add_subplot()
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        yield axes


def _scale(axis: Any, values: Any, logarithmic: bool) -> None:
    """Few ticks with short names; logarithmic axes at 1, 2 and 5 of a decade, fewer where they span many."""
    low, high = min(values), max(values)
    scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    locator: ticker.Locator = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    if logarithmic and low <= 0:  # a logarithmic axis with a place for zero
        first = min((x for x in values if x > 0), default=1.0)
        scale("symlog", linthresh=first, linscale=0.4)
        powers = range(math.ceil(math.log10(high / first)) + 1 if high > first else 1)
        locator = ticker.FixedLocator([0.0, *(first * 10.0**power for power in powers)])
    elif logarithmic:
        scale("log")
        if (decades := math.log10(high / low)) > 0.5:
            subs = (1, 2, 3, 5, 7) if decades < 1.1 else (1, 2, 5) if decades < 3 else (1,)
            locator = ticker.LogLocator(subs=subs)
    axis.set_major_locator(locator)
    if logarithmic or high >= 1e4:
        axis.set_major_formatter(lambda x, _: _short(x))
    axis.set_minor_locator(ticker.NullLocator())


def _place(axes: Any, y_label: str) -> None:
    """Axes as large as their names leave them, the unit of y over them, where it reads without turning the head.

    matplotlib's own layouts draw every picture twice.
    """
    if y_label:
        axes.set_title(y_label, loc="left", x=0, fontsize="medium")
    names = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
    room = 8 + 6.2 * max(map(len, names), default=0)  # of a name, in the units of the picture
    width, height = 72 * axes.figure.get_size_inches()
    above, below = (22 if y_label else 4) / height, 34 / height
    axes.set_position((room / width, below, 1 - (room + 8) / width, 1 - below - above))


def _short(value: float) -> str:
    """A number on an axis: 250k for 250,000, and in full what is not so round."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4) and float(value / size * 10).is_integer():
            return f"{plain(value / size)}{letter}"
    return plain(round(value, 10))
