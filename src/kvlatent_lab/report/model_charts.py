"""Sections of single measurements of the models: needles as heat maps, word order as curves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kvlatent.evaluation.result_models import WordOrder
from kvlatent_lab.report.blocks import Block, Section, line_block, section
from kvlatent_lab.report.charts import Line, points
from kvlatent_lab.report.measured_models import Measured, measured_models
from kvlatent_lab.report.page_listings import Listing, entry, share
from kvlatent_lab.report.result_files import Documents

__all__ = ["needles", "order_line", "word_order"]


def needles(documents: Documents) -> Section | None:
    """Heat maps of the needle, the original's and the latent model's side by side."""
    models = [one for one in measured_models(documents) if one.figures.needle is not None]
    sources = [one.source for one in models]
    blocks = [
        Block(title, tuple(_heat(one, score) for one in models), sources=sources, wide=True)
        for score, title in (("exact", "Reproduced exactly"), ("rank", "Mean reciprocal rank of its tokens"))
        if models
    ]
    lead = (
        "Something is hidden in a long text and asked for at its end. Rows: how long the text is, in tokens. Columns: how "
        "deep it is hidden, from the start (0 %) to the end (100 %). The fuller the colour, the better."
    )
    return section("needle", "Needle in a haystack", lead, blocks)


def _heat(one: Measured, score: str) -> Listing:
    """A share in per cent, a rank as it is."""
    needle: Any = one.figures.needle
    rows = []
    for context, row in zip(needle.contexts, getattr(needle, score), strict=True):
        shades = [share(value, places=0, shade=True) for value in row]
        if score == "rank":
            shades = [replace(shade, text=f"{value:.2f}") for shade, value in zip(shades, row, strict=True)]
        rows.append((f"{context:,}", shades))
    columns = [f"{100 * depth:.0f} %" for depth in needle.depths]
    return Listing.of(f"needle-{score}-{one.label}", "tokens", columns, rows, caption=one.label, heat=True)


def word_order(documents: Documents) -> Section | None:
    """By how much the true order is likelier than a permuted one, against the length of the span."""
    models = [one for one in measured_models(documents) if one.figures.order is not None]
    nats = "nats, mean over depths; band: smallest to largest"
    blocks = []
    for score, title, y_label in (
        ("margin", "How much likelier the true order is", nats),
        ("after_margin", "The same, by what follows the span", nats),
        ("preferred", "How often the true order is likelier", "share of permutations, mean over depths"),
    ):
        chosen = [one for one in models if getattr(one.figures.order, score) is not None]
        lines = []
        for one in chosen:
            assert one.figures.order is not None
            role = "original" if one.is_original else ""
            lines.append(order_line(one.label, one.figures.order, score, role, band=score != "preferred"))
        block = line_block(
            f"order-{score}",
            title,
            lines,
            x_label="span that is permuted, tokens",
            y_label=y_label,
            at_points=True,
            sources=[one.source for one in chosen],
        )
        if block is not None:
            grids = tuple(_order_grid(one, score) for one in chosen)
            blocks.append(replace(block, listings=(*block.listings, *grids)))
    lead = (
        "Words of a short span are permuted. A model that knows its positions finds the true order likelier; one that "
        "lost its high frequencies does not notice, and short spans suffer first."
    )
    return section("order", "Word order", lead, blocks)


def order_line(label: str, order: WordOrder, score: str, role: str, *, band: bool) -> Line:
    """A score by span, its mean over depths; with `band` from the smallest to the largest where there are several."""
    grid = np.array(getattr(order, score))
    ends = (grid.min(axis=1), grid.max(axis=1)) if band and grid.shape[1] > 1 else (None, None)
    return Line(label, points(order.spans, grid.mean(axis=1), None, *ends), role, dashed=role == "original")


def _order_grid(one: Measured, score: str) -> Listing:
    order: Any = one.figures.order
    columns = [f"depth {depth:g}" for depth in order.depths]
    grid = getattr(order, score)
    errors = getattr(order, f"{score}_standard_error") or [[None] * len(columns)] * len(grid)
    rows = [
        (f"{span}", [*map(entry, row, row_errors)])
        for span, row, row_errors in zip(order.spans, grid, errors, strict=True)
    ]
    return Listing.of(f"order-{score}-{one.label}", "span", columns, rows, caption=f"{one.label}, by depth")
