"""Answers and progress, printed whole: no figure is ever cut short, however narrow the terminal is.

rich cuts a cell that does not fit and puts an ellipsis at its end, or drops a column, which turns `0.412` into `0.4…`.
Where nobody's terminal limits them (a file, a pipe) rows are as long as they are, one line each; in a terminal cells
fold over several lines, names before figures.
"""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

__all__ = ["answer_console", "print_listing", "progress_bar"]

_UNLIMITED = 1_000_000  # characters a line
_SHORTEST_FOLD = 8  # characters of a name that stay on one line


def answer_console(file: IO[str]) -> Console:
    """A console that takes text as it is, and has the terminal's width only where there is a terminal."""
    return Console(
        file=file,
        width=None if file.isatty() else _UNLIMITED,
        highlight=False,
        markup=False,  # a model's name may hold brackets
        emoji=False,
        soft_wrap=True,
    )


def print_listing(console: Console, listing: Table) -> None:
    """Print all of a listing; right-aligned columns are figures, whose words stay in one piece.

    Where a terminal has no room for the figures alone, the lines are longer than it, and it wraps them.
    """
    for column in listing.columns:
        words = [len(word) for cell in column.cells for word in str(cell).split()]
        column.no_wrap, column.overflow = False, "fold"
        column.min_width = max(words, default=1) if column.justify == "right" else _SHORTEST_FOLD
    least = sum((column.min_width or 0) + sum(listing.padding[1::2]) for column in listing.columns)
    least += len(listing.columns) + 1  # a line between columns, and both edges
    console.width = max(console.width, least)
    if console.measure(listing).maximum >= console.width:
        _fix_wide_columns(listing, console.width)
    console.print(listing, crop=False)


def _fix_wide_columns(listing: Table, width: int) -> None:
    """Columns whose figures need more than their share keep it: rich narrows all to one width, and then exceeds the whole."""
    columns = sorted(listing.columns, key=lambda column: column.min_width or 0, reverse=True)
    room = width - 1 - len(columns) * (1 + sum(listing.padding[1::2]))
    for left, column in zip(range(len(columns), 0, -1), columns, strict=True):
        needed = column.min_width or 0
        if needed * left <= room:
            return
        column.width = needed
        room -= needed


def progress_bar() -> Progress:
    """How far a step is, on stderr; hidden where that is no terminal."""
    return Progress(
        TextColumn("{task.description:<22}", table_column=_folding()),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=_folding()),
        TextColumn("{task.fields[note]}", table_column=_folding()),
        TextColumn("{task.fields[left]}", table_column=_folding()),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _folding() -> Column:
    return Column(overflow="fold")
