"""What a page is made of: sections of blocks, each a chart with its numbers, or a table, and where they are from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlatent_lab.report.charts import MOST_LINES, Chart, Line, line_chart
from kvlatent_lab.report.html_tables import Cell, Table, cell, distinct, plain
from kvlatent_lab.report.result_files import Document

__all__ = ["Block", "Section", "line_block", "line_table", "numbers_in"]


@dataclass(frozen=True)
class Block:
    """A chart with its numbers folded under it, or tables side by side; then a note and points of text.

    `wide` takes the whole row of the page.
    """

    title: str
    tables: tuple[Table, ...]
    chart: Chart | None = None
    note: str = ""
    points: tuple[str, ...] = ()
    sources: tuple[Document, ...] = ()
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; `lead` says how its charts are read; `tiles` are large figures with what they are."""

    name: str
    title: str
    lead: str
    blocks: tuple[Block, ...]
    tiles: tuple[tuple[Cell, str], ...] = ()


def line_block(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    sources: Sequence[Document],
    note: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] = (),
    level: float | None = None,
    table: Table | None = None,
) -> Block | None:
    """A line chart and its table; None where there is no point.

    Lines beyond `MOST_LINES` are in the table only, and the note says so. A logarithmic axis is kept where all numbers
    of it are above 0. `table` replaces the one made from the lines.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    labels = distinct([line.label for line in lines])
    lines = [replace(line, label=label) for line, label in zip(lines, labels, strict=True)]
    drawn = lines[:MOST_LINES]
    if len(lines) > len(drawn):
        left = len(lines) - len(drawn)
        more = f"{left} more {'line is' if left == 1 else 'lines are'} in the table only."
        note = f"{note} {more}".strip()
    chart = line_chart(
        name,
        drawn,
        title=title,
        x_label=x_label,
        y_label=y_label,
        log_x=log_x and all(x >= 0 for line in drawn for x in line.x),
        log_y=log_y and all(y > 0 for line in drawn for y in line.y),
        x_ticks=x_ticks,
        level=level,
    )
    table = table or line_table(name, x_label, lines, caption=f"{title}: {y_label}")
    return Block(title, (table,), chart, note, sources=tuple(sources))


def line_table(name: str, corner: str, lines: Sequence[Line], *, caption: str = "") -> Table:
    """The numbers of a line chart: a row for each x, a column for each line; beside it two for the ends of its band."""
    columns: dict[str, dict[float, Cell]] = {}
    for line in lines:
        errors = line.error or [None] * len(line.y)
        columns[line.label] = {x: cell(y, error) for x, y, error in zip(line.x, line.y, errors, strict=True)}
        for end, values in zip(("lower", "upper"), line.band or (), strict=False):
            columns[f"{line.label}, {end}"] = {x: cell(y) for x, y in zip(line.x, values, strict=True)}
    places = sorted({x for column in columns.values() for x in column})
    rows = [(plain(x), [column.get(x, Cell("–")) for column in columns.values()]) for x in places]
    return Table.of(name, corner, list(columns), rows, caption=caption)


def numbers_in(value: Any) -> list[float]:
    """All numbers of a nested list, in order."""
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
