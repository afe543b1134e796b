"""Sections on positions: needles in a haystack as heat maps, word order as curves."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from kvlatent_lab.report.blocks import Block, Section, line_block
from kvlatent_lab.report.charts import Line
from kvlatent_lab.report.html_tables import Cell, Table, cell, share
from kvlatent_lab.report.measured import Measured, measured_models
from kvlatent_lab.report.result_files import Documents

__all__ = ["needles", "word_order"]


def needles(documents: Documents) -> Section | None:
    """Heat maps of the needle, the original's and the latent model's side by side."""
    models = [one for one in measured_models(documents) if one.figures.needle is not None]
    blocks = []
    for score, title in (("exact", "Reproduced exactly"), ("rank", "Mean reciprocal rank of its tokens")):
        tables = tuple(_heat(one, score) for one in models if getattr(one.figures.needle, score) is not None)
        if tables:
            blocks.append(Block(title, tables, sources=tuple(one.source for one in models), wide=True))
    lead = (
        "Something is hidden in a long text and asked for at its end. Rows: how long the text is, in tokens. Columns: how "
        "deep it is hidden, from the start (0 %) to the end (100 %). The fuller the colour, the better."
    )
    return Section("needle", "Needle in a haystack", lead, tuple(blocks)) if blocks else None


def _heat(one: Measured, score: str) -> Table:
    needle = one.figures.needle
    assert needle is not None
    columns = [f"{100 * depth:.0f} %" for depth in needle.depths]
    grid = getattr(needle, score)
    rows = [
        (f"{context:,}", [_shaded(value, score) for value in row])
        for context, row in zip(needle.contexts, grid, strict=True)
    ]
    return Table.of(f"needle-{score}-{one.label}", "tokens", columns, rows, caption=one.label, heat=True)


def _shaded(value: float, score: str) -> Cell:
    """A share in per cent, a rank as it is."""
    shaded = share(value, places=0, shade=True)
    return shaded if score == "exact" else replace(shaded, text=f"{value:.2f}")


def word_order(documents: Documents) -> Section | None:
    """By how much the true order is likelier than a permuted one, against the length of the span."""
    models = [one for one in measured_models(documents) if one.figures.order is not None]
    blocks = []
    for score, title, y_label in (
        (
            "margin",
            "How much likelier the true order is",
            "nats, mean over depths; band: smallest to largest",
        ),
        (
            "after_margin",
            "The same, by what follows the span",
            "nats, mean over depths; band: smallest to largest",
        ),
        ("preferred", "How often the true order is likelier", "share of permutations, mean over depths"),
    ):
        chosen = [one for one in models if getattr(one.figures.order, score) is not None]
        lines = [_order_line(one, score) for one in chosen]
        block = line_block(
            f"order-{score}",
            title,
            lines,
            x_label="span that is permuted, tokens",
            y_label=y_label,
            x_ticks=sorted({x for line in lines for x in line.x}),
            sources=[one.source for one in chosen],
        )
        if block is not None:
            grids = tuple(_order_grid(one, score) for one in chosen)
            blocks.append(replace(block, tables=(*block.tables, *grids)))
    lead = (
        "Words of a short span are permuted. A model that knows its positions finds the true order likelier; one that "
        "lost its high frequencies does not notice, and short spans suffer first."
    )
    return Section("order", "Word order", lead, tuple(blocks)) if blocks else None


def _order_line(one: Measured, score: str) -> Line:
    order = one.figures.order
    assert order is not None
    grid = getattr(order, score)
    band = ([min(row) for row in grid], [max(row) for row in grid]) if len(order.depths) > 1 else None
    return Line(
        one.label,
        order.spans,
        [fmean(row) for row in grid],
        band=None if score == "preferred" else band,
        role="original" if one.is_original else "",
        dashed=one.is_original,
    )


def _order_grid(one: Measured, score: str) -> Table:
    order = one.figures.order
    assert order is not None
    columns = [f"depth {depth:g}" for depth in order.depths]
    errors = getattr(order, f"{score}_standard_error", None) or [[None] * len(order.depths)] * len(
        order.spans
    )
    rows = [
        (f"{span}", [cell(value, error) for value, error in zip(row, row_errors, strict=True)])
        for span, row, row_errors in zip(order.spans, getattr(order, score), errors, strict=True)
    ]
    return Table.of(f"order-{score}-{one.label}", "span", columns, rows, caption=f"{one.label}, by depth")
