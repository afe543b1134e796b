"""The charts of the page: lines with errors and bands, and dots in rows. Small enough for a phone, legends outside.

A legend is HTML, so that its text wraps and scales with the page; the picture holds data, axes and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvlatent_lab.report.html_tables import plain
from kvlatent_lab.report.svg import ROLES, embedded

__all__ = ["MOST_LINES", "Chart", "Line", "check_libraries", "dot_chart", "line_chart", "styled"]

MOST_LINES = 6
_SIZE = (5.0, 3.1)  # inches of 72 units: a phone shows about one unit a pixel
_COLOURS = ("c1", "c2", "c3", "c4", "c5", "muted")
_MARKS = {"c1": "o", "c2": "s", "c3": "^", "c4": "D", "c5": "v", "muted": "x", "original": "o"}


@dataclass(frozen=True)
class Line:
    """One line: points in order of x, errors of y, a band around y, a role of colour (none: the next free one).

    `steps` draws level pieces, for what is of a layer and has no values between two of them.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] | None = None
    band: tuple[Sequence[float], Sequence[float]] | None = None
    role: str = ""
    dashed: bool = False
    marks: bool = True
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture as SVG, and its legend: label, role, whether dashed, mark."""

    svg: str
    legend: tuple[tuple[str, str, bool, str], ...]


def check_libraries() -> None:
    """Raise `ValueError` where matplotlib or jinja2 is not installed."""
    for name in ("matplotlib", "jinja2"):
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f'a report needs {name}; pip install "kvlatent[report]"') from error


def styled(lines: Sequence[Line]) -> list[tuple[Line, str, str]]:
    """Lines with their role and mark: those that ask for a role get it, the others what is left, in order."""
    taken = {line.role for line in lines}
    free = iter([role for role in _COLOURS if role not in taken] + ["muted"] * len(lines))
    return [(line, role := line.role or next(free), _MARKS[role] if line.marks else "") for line in lines]


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] = (),
    level: float | None = None,
) -> Chart:
    """Draw lines over one pair of axes.

    Args:
        name: of the chart, its own on the page.
        lines: at most `MOST_LINES`; all of them are in the legend if there are two or more.
        title: for a screen reader.
        x_label, y_label: with their units; the second stands over the axis, level.
        log_x, log_y: logarithmic axes; every number must then be above 0.
        x_ticks: where the x axis is named; empty leaves it to matplotlib.
        level: draw a level line there (what the original has).
    """
    with _page() as figure:
        axes = figure.add_subplot()
        if level is not None:
            axes.axhline(level, color=ROLES["original"], linewidth=1.2, linestyle=(0, (4, 3)))
        dressed = styled(lines)
        for line, role, mark in dressed:
            _draw(axes, line, ROLES[role], mark)
        _scale(axes, log_x, log_y, x_ticks)
        _dress(axes, x_label, y_label)
        svg = embedded(figure, name, title)
    legend = [(line.label, role, line.dashed, mark) for line, role, mark in dressed]
    return Chart(svg, tuple(legend) if len(legend) > 1 else ())


def _draw(axes: Any, line: Line, colour: str, mark: str) -> None:
    style = (0, (4, 3)) if line.dashed else "-"
    x, y = _floats(line.x), _floats(line.y)
    if line.band is not None:
        axes.fill_between(x, *map(_floats, line.band), color=colour, alpha=0.14, linewidth=0)
    drawn = {
        "drawstyle": "steps-mid" if line.steps else "default",
        "linewidth": 1.2 if len(line.x) > 60 else 1.7,
        "markersize": 5,
    }
    axes.plot(x, y, color=colour, linestyle=style, marker=mark, **drawn)
    if line.error is not None:
        known = [point for point in zip(x, y, line.error, strict=True) if point[2] is not None]
        if known:
            x, y, error = zip(*known, strict=True)
            axes.errorbar(x, y, yerr=_floats(error), fmt="none", color=colour, elinewidth=1.1, capsize=2.5)


def _floats(values: Sequence[float]) -> list[float]:
    """Numbers as matplotlib wants them: numpy takes an integer beyond 64 bits for an object."""
    return [float(value) for value in values]


def dot_chart(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float | None],
    *,
    title: str,
    x_label: str,
    log_x: bool = False,
    level: float | None = None,
) -> Chart:
    """Draw one dot a row with its error, the first row on top; long labels are broken."""
    wrap = import_module("textwrap").wrap
    wrapped = [wrap(label, 60) or [""] for label in labels]
    rows, height = [], 0.0
    for lines in reversed(wrapped):  # from the axis upwards; a row is its dot and above it its label
        rows.insert(0, height)
        height += 0.9 + 0.5 * len(lines)
    with _page(height=0.6 + 0.3 * height) as figure:
        axes = figure.add_subplot()
        if level is not None:
            axes.axvline(level, color=ROLES["original"], linewidth=1.2, linestyle=(0, (4, 3)))
        values, spread = _floats(values), _floats([error or 0.0 for error in errors])
        axes.errorbar(values, rows, xerr=spread, fmt="o", color=ROLES["c1"], markersize=5.5, elinewidth=1.1)
        for y, lines in zip(rows, wrapped, strict=True):
            for number, line in enumerate(reversed(lines)):
                at = {"xy": (0, y + 0.4 + 0.5 * number), "xycoords": ("axes fraction", "data")}
                axes.annotate(line, **at, color=ROLES["ink"], fontsize=8.5)
        axes.set_ylim(-0.6, height - 0.2)
        _scale(axes, log_x, False, ())
        axes.set_yticks([])
        _dress(axes, x_label, "")
        svg = embedded(figure, name, title)
    return Chart(svg, ())


@contextmanager
def _page(height: float = _SIZE[1]) -> Generator[Any]:
    """A figure in the page's style. Text is never read as mathematics: a name may hold a dollar sign."""
    matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kvlatent",
        "text.parse_math": False,
        "font.size": 9,
        "text.color": ROLES["ink"],
        "axes.labelcolor": ROLES["muted"],
        "axes.edgecolor": ROLES["rule"],
        "xtick.color": ROLES["rule"],
        "ytick.color": ROLES["rule"],
        "xtick.labelcolor": ROLES["muted"],
        "ytick.labelcolor": ROLES["muted"],
        "grid.color": ROLES["rule"],
    }
    with matplotlib.rc_context(style):
        yield figures.Figure(figsize=(_SIZE[0], height))


def _scale(axes: Any, log_x: bool, log_y: bool, x_ticks: Sequence[float]) -> None:
    """Few ticks with short names; logarithmic axes at 1, 2 and 5 of a decade, fewer where they span many."""
    ticker = import_module("matplotlib.ticker")
    for axis, wanted in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        low, high = axis.get_data_interval()
        axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        if wanted and low <= 0:  # a logarithmic axis with a place for zero
            first = min((x for line in axes.get_lines() for x in line.get_xdata() if x > 0), default=1.0)
            getattr(axes, f"set_{axis.axis_name}scale")("symlog", linthresh=first, linscale=0.4)
            powers = range(math.ceil(math.log10(high / first)) + 1 if high > first else 1)
            places = [0.0, *(place for power in powers if (place := first * 10.0**power) <= high)]
            axis.set_major_locator(ticker.FixedLocator(places))
        elif wanted:
            getattr(axes, f"set_{axis.axis_name}scale")("log")
            axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        if wanted and low > 0 and (decades := math.log10(high / low)) > 0.5:
            subs = (1, 2, 3, 5, 7) if decades < 1.1 else (1, 2, 5) if decades < 3 else (1,)
            axis.set_major_locator(ticker.LogLocator(subs=subs))
        even = ticker.ScalarFormatter(useOffset=False)
        even.set_scientific(False)
        plainly = wanted or high >= 1e4
        axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: _short(x)) if plainly else even)
        axis.set_minor_locator(ticker.NullLocator())
    if x_ticks:
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: _short(x)))
        axes.set_xticks(_apart(axes, x_ticks))


def _short(value: float) -> str:
    """A number on an axis: 250k for 250,000, and in full what is not so round."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4) and float(value / size * 10).is_integer():
            return f"{plain(value / size)}{letter}"
    return plain(round(value, 10))


def _apart(axes: Any, places: Sequence[float]) -> list[float]:
    """Those of the places that are far enough from the one before for their names."""
    axes.autoscale_view()
    low, high = axes.transData.transform([(x, 1.0) for x in axes.get_xlim()])[:, 0]
    kept: list[tuple[float, float]] = []
    for place in sorted(_floats(places)):
        at = axes.transData.transform((place, 1.0))[0]
        if not kept or at - kept[-1][1] > 0.075 * (high - low):
            kept.append((place, at))
    return [place for place, _ in kept]


def _dress(axes: Any, x_label: str, y_label: str) -> None:
    """No frame, level grid lines or none, the unit of y over the axis where it reads without turning the head."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y" if y_label else "x", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel(x_label)
    if y_label:
        above = {"xytext": (0, 8), "textcoords": "offset points", "xycoords": "axes fraction"}
        axes.annotate(y_label, (0, 1), color=ROLES["muted"], annotation_clip=False, **above)
    names = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
    room = 8 + 6.2 * max(map(len, names), default=0)  # of a name, in the units of the picture
    width, height = 72 * axes.figure.get_size_inches()
    axes.set_position(
        (room / width, 34 / height, 1 - (room + 8) / width, 1 - (34 + (22 if y_label else 4)) / height)
    )
