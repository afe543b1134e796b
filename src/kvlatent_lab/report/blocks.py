"""What a page is made of: sections of blocks, each a chart with its numbers, or listings, and where they are from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from kvlatent_lab.report.charts import MOST_LINES, Chart, Line, dot_chart, line_chart
from kvlatent_lab.report.page_listings import Listing, distinct, entry, plain
from kvlatent_lab.report.result_files import Document

__all__ = ["Block", "Section", "dot_block", "line_block", "section"]


@dataclass(frozen=True)
class Block:
    """A chart with its numbers folded under it, or listings side by side; then a note and points of text.

    `wide` takes the whole row of the page.
    """

    title: str
    listings: tuple[Listing, ...] = ()
    chart: Chart | None = None
    note: str = ""
    points: tuple[str, ...] = ()
    sources: Sequence[Document] = ()
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; `lead` says how its charts are read; `tiles` are large figures with what they are."""

    name: str
    title: str
    lead: str
    blocks: Sequence[Block]
    tiles: Sequence[tuple[Any, str]] = ()


def section(name: str, title: str, lead: str, blocks: Sequence[Block | None]) -> Section | None:
    """A section of the blocks that have something to show; None where there is none."""
    kept = [block for block in blocks if block is not None]
    return Section(name, title, lead, kept) if kept else None


def line_block(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    sources: Sequence[Document],
    note: str = "",
    listing: Listing | None = None,
    **axes: Any,
) -> Block | None:
    """A line chart and its listing, unless `listing` replaces it; None where there is no point. `axes`: see `line_chart`.

    Lines beyond `MOST_LINES` are in the listing only, and the note says so.
    """
    lines = [line for line in lines if len(line.points)]
    if not lines:
        return None
    labels = distinct([line.label for line in lines])
    lines = [replace(line, label=label) for line, label in zip(lines, labels, strict=True)]
    if (left := len(lines) - MOST_LINES) > 0:
        more = f"{left} more {'line is' if left == 1 else 'lines are'} in the listing only."
        note = f"{note} {more}".strip()
    chart = line_chart(name, lines[:MOST_LINES], title=title, x_label=x_label, y_label=y_label, **axes)
    listing = listing or _listing(name, x_label, lines, caption=f"{title}: {y_label}")
    return Block(title, (listing,), chart, note, sources=sources)


def dot_block(
    name: str,
    title: str,
    dots: pd.DataFrame,
    *,
    label: str,
    sources: Sequence[Document],
    listing: Listing | None = None,
) -> Block:
    """Variants by their perplexity over the original's: `dots` by label, "y" and "error". `label`: what one is."""
    what = "perplexity over the original's"
    dots = dots.set_axis(distinct(list(dots.index)), axis=0)
    wide = dots["y"].max() > 4 * dots["y"].min()
    chart = dot_chart(name, dots, title=title, x_label=what, log_x=wide, level=1.0)
    rows = [(name, [entry(y, error)]) for name, y, error in dots[["y", "error"]].itertuples()]
    return Block(title, (listing or Listing.of(name, label, [what], rows),), chart, sources=sources)


def _listing(name: str, corner: str, lines: Sequence[Line], *, caption: str) -> Listing:
    """The numbers of a line chart: a row for each x, a column for each line; beside it two for the ends of its band."""
    points = pd.concat({line.label: line.points for line in lines}, axis=1).sort_index()
    columns: dict[str, list[Any]] = {}
    for line in lines:
        columns[line.label] = list(map(entry, points[line.label, "y"], points[line.label, "error"]))
        if line.points["lower"].notna().any():
            columns |= {
                f"{line.label}, {end}": [entry(value) for value in points[line.label, end]]
                for end in ("lower", "upper")
            }
    rows = [
        (plain(x), each) for x, each in zip(points.index, zip(*columns.values(), strict=True), strict=True)
    ]
    return Listing.of(name, corner, list(columns), rows, caption=caption)
