"""The section on rotary tables: what they do to the similarity of a vector to itself, and to the order of words.

The first is equation 10 of the paper, over d.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from statistics import fmean
from typing import Any

from kvlatent_lab.report.blocks import Block, Section, line_block
from kvlatent_lab.report.cells import TOKENS, Group, grouped
from kvlatent_lab.report.charts import Line
from kvlatent_lab.report.measured import measured_models
from kvlatent_lab.report.result_files import Document, Documents
from kvlatent_lab.report.study_charts import said

__all__ = ["attenuation_curves"]

_WIDTHS = ("d_qk", "width")
_TABLES = ("rope", "table")
_ROLES = {"calibrated": "c1", "frequency-aware": "c2", "paper": "c2"}
_OWN = ("curve", "similarity", "latent", "attenuation")
_SIMILARITY = "mean over pairs of cos(distance × frequency)"
_POSITIONS = range(129)
"""Distances, in tokens, at which the curve of a bare table is computed."""


def attenuation_curves(documents: Documents) -> Section | None:
    """A chart a width, a line a table, from the study of rotary tables; beside it the order of words at that width.

    Of evaluated models, whose tables are known, the mean curve of each.
    """
    cells = [one for one in documents.of("study") if _curves(one)]
    blocks = [_of_models(documents)]
    for title, trainings in _by_width(cells).items():
        first = next(iter(trainings.values()))  # training leaves the tables as they are
        blocks.append(_attenuation(f"attenuation-{title}", title, first, [cell for _, cell in first]))
        for training, members in trainings.items():
            place = ", ".join(part for part in (title, training) if part)
            blocks.append(_orders(f"rope-order-{place}", place, members, [cell for _, cell in members]))
    lead = (
        "How similar a query stays to an equal key as they move apart. A fall that is slow near 0 tells near tokens apart "
        "badly; one that comes back up confuses distances."
    )
    found = tuple(block for block in blocks if block is not None)
    return Section("rope", "Attenuation of the rotary tables", lead, found) if found else None


def _of_models(documents: Documents) -> Block | None:
    """The mean over all tables of a model, and how far they lie apart."""
    lines, sources = [], []
    for one in measured_models(documents):
        if one.config is not None:
            curves = _each([table.short for layer in one.config.tables for table in layer])
            mean, band = [fmean(at) for at in zip(*curves, strict=True)], None
            if len(curves) > 1:
                band = (
                    [min(at) for at in zip(*curves, strict=True)],
                    [max(at) for at in zip(*curves, strict=True)],
                )
            lines.append(Line(one.label, _POSITIONS, mean, band=band, marks=False))
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


def _by_width(cells: Sequence[Document]) -> dict[str, dict[str, list[tuple[str, Document]]]]:
    """Cells by width, then by how long they were trained where that varies; of several seeds the first."""
    varying, groups = grouped(cells)
    width = next((name for name in _WIDTHS if name in varying), "")
    trained = len({group.settings.get(TOKENS) for group in groups}) > 1
    found: dict[str, dict[str, list[tuple[str, Document]]]] = {}
    for group in groups:
        place = f"{width} = {group.settings.get(width)}" if width else "Similarity by distance"
        training = said(TOKENS, group.settings.get(TOKENS)) if trained else ""
        named = _table_name(group, varying, width), group.cells[0]
        found.setdefault(place, {}).setdefault(training, []).append(named)
    return found


def _table_name(group: Group, varying: Sequence[str], width: str) -> str:
    """What a group calls its table; else all its settings that vary, else the cell."""
    own = [name for name in _TABLES if name in varying][:1] or [name for name in varying if name != width]
    return ", ".join(f"{group.settings.get(name)}" for name in own) or group.cells[0].content.cell


def _attenuation(
    name: str, title: str, members: Sequence[tuple[str, Document]], sources: Sequence[Document]
) -> Block | None:
    lines: dict[str, Line] = {}
    for label, cell in members:
        for part, (x, y) in _curves(cell).items():
            if part == "original":
                lines[part] = Line(part, x, y, role="original", dashed=True, marks=False)
            else:
                own = f"{label} {part}".strip()
                lines[own] = Line(own, x, y, role=_ROLES.get(own, ""), marks=False)
    uneven = any(
        len(x) > 2 and x[-1] - x[-2] > 4 * (x[1] - x[0]) for x in (list(line.x) for line in lines.values())
    )
    return line_block(
        name,
        title,
        sorted(lines.values(), key=lambda line: line.label != "original"),
        x_label="distance, tokens",
        y_label=_SIMILARITY,
        log_x=uneven,
        sources=sources,
    )


def _curves(cell: Document) -> dict[str, tuple[Sequence[float], list[float]]]:
    """Curves of a cell by name; "" for its own."""
    known = cell.content.known
    if known.attenuation is not None:
        x = known.attenuation.positions
        return {"" if name in _OWN else name: (x, y) for name, y in known.attenuation.curves.items()}
    if known.inv_freq:
        return {"": (_POSITIONS, _computed(known.inv_freq))}
    return {}


def _computed(inv_freq: Any) -> list[float]:
    """The curve of one table, or the mean over several."""
    curves = _each(inv_freq if isinstance(inv_freq[0], list) else [inv_freq])
    return [fmean(at) for at in zip(*curves, strict=True)]


def _each(tables: Sequence[Sequence[float]]) -> list[list[float]]:
    """The curve of every table."""
    torch, rope = import_module("torch"), import_module("kvlatent.model.rotary")
    positions = torch.tensor(list(_POSITIONS))
    return [
        rope.attenuation(torch.tensor(table, dtype=torch.float64), positions).tolist() for table in tables
    ]


def _orders(
    name: str, title: str, members: Sequence[tuple[str, Document]], sources: Sequence[Document]
) -> Block | None:
    """Margin of the true word order by span; the original once."""
    lines: list[Line] = []
    for label, cell in members:
        known = cell.content.known
        if known.original_order is not None and not any(line.role == "original" for line in lines):
            margins = [fmean(row) for row in known.original_order.margin]
            lines.append(Line("original", known.original_order.spans, margins, role="original", dashed=True))
        if known.order is not None:
            margins = [fmean(row) for row in known.order.margin]
            lines.append(Line(label, known.order.spans, margins, role=_ROLES.get(label, "")))
    return line_block(
        name,
        f"Word order, {title}",
        sorted(lines, key=lambda line: line.role != "original"),
        x_label="span that is permuted, tokens",
        y_label="nats by which the true order is likelier, mean over depths",
        x_ticks=sorted({x for line in lines for x in line.x}),
        sources=sources,
    )
