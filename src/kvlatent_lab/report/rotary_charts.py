"""The section on rotary tables: what they do to the similarity of a vector to itself, and to the order of words.

The first is equation 10 of the paper, over d.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvlatent.model.rotary import attenuation
from kvlatent_lab.report.blocks import Block, Section, line_block, section
from kvlatent_lab.report.charts import Line, points
from kvlatent_lab.report.measured_models import measured_models
from kvlatent_lab.report.model_charts import order_line
from kvlatent_lab.report.result_files import Document, Documents
from kvlatent_lab.report.study_charts import setting_label
from kvlatent_lab.report.study_groups import TOKENS

__all__ = ["attenuation_curves"]

_ROLES = {"calibrated": "c1", "frequency-aware": "c2"}
_SIMILARITY = "mean over pairs of cos(distance × frequency)"
_POSITIONS = torch.arange(129)
"""Distances, in tokens, at which the curve of a bare table is computed."""


def attenuation_curves(documents: Documents) -> Section | None:
    """A chart a width, a line a table, from the study of rotary tables; beside it the order of words at that width.

    Of evaluated models, whose tables are known, the mean curve of each.
    """
    blocks, widths = [_of_models(documents)], _by_width(documents.of("study"))
    trained = len({tokens for trainings in widths.values() for tokens in trainings}) > 1
    for title, trainings in widths.items():
        blocks.append(
            _curves(title, next(iter(trainings.values())))
        )  # training leaves the tables as they are
        for tokens, cells in trainings.items():
            blocks.append(_orders(f"{title}, {setting_label(TOKENS, tokens)}" if trained else title, cells))
    lead = (
        "How similar a query stays to an equal key as they move apart. A fall that is slow near 0 tells near tokens apart "
        "badly; one that comes back up confuses distances."
    )
    return section("rope", "Attenuation of the rotary tables", lead, blocks)


def _of_models(documents: Documents) -> Block | None:
    """The mean over all tables of a model, and how far they lie apart."""
    lines, sources = [], []
    for one in measured_models(documents):
        if one.config is not None:
            tables = [
                torch.tensor(table.short, dtype=torch.float64)
                for layer in one.config.tables
                for table in layer
            ]
            curves = np.stack([attenuation(table, _POSITIONS).numpy() for table in tables])
            ends = (curves.min(axis=0), curves.max(axis=0)) if len(curves) > 1 else (None, None)
            lines.append(
                Line(one.label, points(_POSITIONS.tolist(), curves.mean(axis=0), None, *ends), marks=False)
            )
            sources.append(one.source)
    return line_block(
        "attenuation-models",
        "Tables of the evaluated models",
        lines,
        x_label="distance, tokens",
        y_label=_SIMILARITY,
        note="Mean over all tables; the band is from the lowest to the highest.",
        sources=sources,
    )


def _by_width(cells: Sequence[Document]) -> dict[str, dict[int, dict[str, Document]]]:
    """Cells with a curve by width, tokens trained on, and the name of their table; of several seeds the first."""
    widths: dict[str, dict[int, dict[str, Document]]] = {}
    cells = [one for one in cells if one.content.figures.attenuation is not None]

    def place(one: Document) -> tuple[int, int]:
        return one.content.settings.d_qk or 0, one.content.settings.tokens

    for one in sorted(cells, key=place):
        width, tokens = place(one)
        trainings = widths.setdefault(f"d_qk = {width}", {})
        table = f"{one.content.settings.model_extra.get('rope', one.content.cell)}"
        trainings.setdefault(tokens, {}).setdefault(table, one)
    return widths


def _curves(title: str, cells: dict[str, Document]) -> Block | None:
    """Similarity by distance, the original's once."""
    lines: list[Line] = []
    for label, one in cells.items():
        curves = one.content.figures.attenuation
        if not lines:
            drawn = points(curves.positions, curves.original)
            lines.append(Line("original", drawn, "original", dashed=True, marks=False))
        lines.append(Line(label, points(curves.positions, curves.latent), _ROLES.get(label, ""), marks=False))
    return line_block(
        f"attenuation-{title}",
        title,
        lines,
        x_label="distance, tokens",
        y_label=_SIMILARITY,
        log_x=True,
        sources=list(cells.values()),
    )


def _orders(title: str, cells: dict[str, Document]) -> Block | None:
    """Margin of the true word order by span; the original once."""
    lines: list[Line] = []
    for label, one in cells.items():
        figures = one.content.figures
        if figures.original_order is not None and not lines:
            lines.append(order_line("original", figures.original_order, "margin", "original", band=False))
        if figures.order is not None:
            lines.append(order_line(label, figures.order, "margin", _ROLES.get(label, ""), band=False))
    return line_block(
        f"rope-order-{title}",
        f"Word order, {title}",
        lines,
        x_label="span that is permuted, tokens",
        y_label="nats by which the true order is likelier, mean over depths",
        at_points=True,
        sources=list(cells.values()),
    )
