"""Pictures of the finished rows: quality against bytes of cache, and quality against minutes of making.

Both have the perplexity over the original's upwards, so that a curve which lies lower is better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from kvlatent.jobs.atomic import write_text
from kvlatent_lab.baseline.finished_rows import Figures, bytes_of, making_minutes, ratio_between
from kvlatent_lab.baseline.label_places import place_labels
from kvlatent_lab.baseline.table_rows import NEW, OLD, QUANTISED, SHARES, TOKENS

__all__ = ["draw_bytes", "draw_minutes"]

_TALLEST = 10.0  # times the original's perplexity: worse rows are named under the picture, so that the others are seen
_TICKS = (0.98, 1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10)
_STRETCHED = (
    0.05  # nats under which the logarithmic axis goes over into a level one, so that 1.01 and 1.03 are apart
)
_LOOKS = {  # colour and mark, by what is drawn; all of these colours are read on white
    "original": ("#c2500a", "D"),
    "head": ("#0b6bb0", "o"),
    "model": ("#0b8563", "s"),
    "planned": ("#8a6d00", "P"),
    "int8": ("#a8458a", "^"),
    "int4": ("#a8458a", "v"),
    "trained": ("#1c2024", "*"),
    "paper": ("#5b646d", "X"),
}
_SCOPES = {
    "head": "a table a head",
    "model": "one table for the model",
    "planned": "widths a layer",
    "paper": "the paper's conversion",
}
_METHODS = {"": "", NEW: "", OLD: "as before", "statistics": "statistics alone"}
_HALF = re.compile(r"([a-z]+)(?:-([a-z]+))?-50(?:-kl-([\d.]+M))?")


@dataclass(frozen=True)
class _Point:
    """A row in a picture; `label` is what stands beside it, where that is not plain from the axis."""

    row: str
    x: float
    ratio: float
    error: float
    label: str = ""


@dataclass(frozen=True)
class _Series:
    """Points that a line joins, from left to right. The name stands at the first; what is old is dashed and hollow."""

    name: str
    look: str
    points: list[_Point]
    old: bool = False


def draw_bytes(found: Mapping[str, Figures], path: Path) -> bool:
    """Draw it against the bytes of a token in the cache; returns whether there was a row beside the original.

    Args:
        found: documents by name; path: of the SVG.
    """
    series = _series_of_bytes(found)
    sizes = sorted({point.x for one in series for point in one.points})
    if len(sizes) < 2:
        return False
    whole, least = sizes[-1], sizes[0] / 1.6
    figure, axes = _axes("bytes of a token in the cache, and their share of the original's")
    axes.set_xscale("log", base=2)
    axes.set_xlim(least, whole * 1.15)
    axes.xaxis.set_major_locator(
        ticker.FixedLocator([whole / 2**k for k in range(9) if whole / 2**k > least])
    )
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}\n{100 * x / whole:.3g} %")
    _draw(axes, series)
    _save(figure, path, f"Quality against bytes of cache, {_model(found)}", series, "bytes a token")
    return True


def draw_minutes(found: Mapping[str, Figures], path: Path) -> bool:
    """Draw it against the minutes that rows of half the cache took to make; returns whether there was any.

    Args:
        found: documents by name; path: of the SVG.
    """
    series = _series_of_minutes(found)
    minutes = [point.x for one in series for point in one.points if point.ratio <= _TALLEST]
    if not minutes:
        return False
    figure, axes = _axes("minutes of calibration, conversion and training")
    axes.set_xscale("log")
    axes.set_xlim(min(minutes) / 1.5, max(minutes) * 2.5)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    _draw(axes, series)
    _save(figure, path, f"Quality against minutes at half the cache, {_model(found)}", series, "minutes")
    return True


def _model(found: Mapping[str, Figures]) -> str:
    return next(iter(found.values()))["model"]


def _series_of_bytes(found: Mapping[str, Figures]) -> list[_Series]:
    def points(rows: Mapping[str, str]) -> list[_Point]:
        made = (_point(found, row, label, bytes_of) for row, label in rows.items())
        return sorted((one for one in made if one is not None), key=lambda point: point.x)

    tokens = next(iter(TOKENS))
    alone = {f"original-{kind}": f"{kind} alone" for kind in QUANTISED}
    wanted = [_Series("", "original", points({"original": "original", **alone}))]
    for name, look, scope, end in (
        (f"narrower, {_SCOPES['head']}", "head", "head", ""),
        (f"narrower, {_SCOPES['model']}", "model", "model", ""),
        (f"narrower, {_SCOPES['planned']}", "planned", "planned", ""),
        *((f"narrower, {kind}", kind, "head", f"-{kind}") for kind in QUANTISED),
        (f"narrower, trained on {tokens} tokens", "trained", "head", f"-kl-{tokens}"),
        (f"{_SCOPES['planned']}, trained on {tokens} tokens", "trained", "planned", f"-kl-{tokens}"),
    ):
        new, old = (
            points({f"{scope}-{method}-{share}{end}": "" for share in SHARES}) for method in (NEW, OLD)
        )
        wanted.append(_Series(name, look, new))
        if (
            look == "head" or not new
        ):  # the method as it was, in one line, and where nothing newer is measured
            wanted.append(_Series(f"{name}, as before", look, old, old=True))
    return [one for one in wanted if one.points]


def _series_of_minutes(found: Mapping[str, Figures]) -> list[_Series]:
    """By scope and method; training goes on from the first point."""
    lines: dict[tuple[str, str], list[_Point]] = {}
    for row in found:
        if matched := _HALF.fullmatch(row):
            scope, tuned, tokens = matched.groups()
            point = _point(found, row, f"{tokens} tokens" if tokens else "", making_minutes)
            if point is not None:
                lines.setdefault((scope, tuned or ""), []).append(point)
    return [
        _Series(
            ", ".join(part for part in (_SCOPES[scope], _METHODS[tuned]) if part),
            scope,
            sorted(points, key=lambda point: point.x),
            old=tuned not in (NEW, ""),
        )
        for (scope, tuned), points in lines.items()
    ]


def _point(found: Mapping[str, Figures], row: str, label: str, x_of: Any) -> _Point | None:
    if row not in found or "original" not in found or not (x := x_of(found[row])):
        return None
    ratio = ratio_between(found[row], found["original"])
    return None if ratio is None else _Point(row, x, ratio[0], ratio[1] or 0.0, label)


def _axes(x_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.set(xlabel=x_label, ylabel="perplexity on FineWeb / the original's\n(log axis, stretched at 1)")
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _stretch(ratio: Any) -> Any:
    return np.arcsinh(np.log(np.maximum(ratio, 1e-9)) / _STRETCHED)


def _unstretch(height: Any) -> Any:
    return np.exp(_STRETCHED * np.sinh(height))


def _draw(axes: Any, series: list[_Series]) -> None:
    axes.axhline(1, color="#5b646d", linewidth=0.8)
    labels = []
    for one in series:
        colour, mark = _LOOKS[one.look]
        shown = [point for point in one.points if point.ratio <= _TALLEST]
        axes.errorbar(
            [p.x for p in shown],
            [p.ratio for p in shown],
            yerr=[p.error for p in shown],
            color=colour,
            linestyle="--" if one.old else "-",
            marker=mark,
            markerfacecolor="white" if one.old else colour,
            markersize=5,
            linewidth=1.4,
            elinewidth=1,
            capsize=2.5,
        )
        for at, point in enumerate(shown):
            text = ": ".join(part for part in (one.name if at == 0 else "", point.label) if part)
            labels.append((text, point.x, point.ratio, colour))
    shown = [point for one in series for point in one.points if point.ratio <= _TALLEST]
    ends = [1.0, *(p.ratio - p.error for p in shown), *(p.ratio + p.error for p in shown)]
    low, high = _stretch(min(ends)), _stretch(max(1.1, *ends))
    axes.set_ylim(*_unstretch(np.array([low - 0.06 * (high - low), high + 0.06 * (high - low)])))
    axes.yaxis.set_major_locator(ticker.FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(lambda y, _: f"x{y:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    place_labels(axes, labels)


def _save(figure: Figure, path: Path, title: str, series: list[_Series], unit: str) -> None:
    """Write the SVG with its title and a description of all points for who cannot see it; equal rows give equal files."""
    points = [point for one in series for point in one.points]
    hidden = [f"{point.row} x{point.ratio:,.0f}" for point in points if point.ratio > _TALLEST]
    figure.axes[0].set_title(title, loc="left", fontsize=10)
    if hidden:
        figure.supxlabel(f"above the picture: {', '.join(hidden)}", fontsize=8, x=0.99, ha="right")
    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvlatent", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": title})
    told = "; ".join(f"{p.row} x{p.ratio:.3f} ± {p.error:.3f} at {p.x:,.5g} {unit}" for p in points)
    about = f"Perplexity on FineWeb over the original's: {told}."
    named = f'<title id="title">{escape(title)}</title><desc id="about">{escape(about)}</desc>'
    drawn = re.sub(r"<title>.*?</title>", lambda _: named, file.getvalue(), count=1)
    write_text(path, drawn.replace("<svg ", '<svg role="img" aria-labelledby="title about" ', 1))
