"""The section on quality against cache: every conversion that any document knows, on one pair of axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from kvlatent_lab.report.blocks import Section, line_block
from kvlatent_lab.report.cells import cache_share, flat, frontier, widths_of
from kvlatent_lab.report.charts import MOST_LINES, Line
from kvlatent_lab.report.html_tables import Table, cell, plain, share
from kvlatent_lab.report.measured import measured_models
from kvlatent_lab.report.result_files import Document, Documents
from kvlatent_lab.spread import standard_error

__all__ = ["quality"]

_CLOSE = 1.5
"""Ratios up to here are shown a second time, on a scale of their own."""

_SAME = 1.001
"""Perplexities of one model on one text are equal up to this factor, whatever the machine."""


@dataclass(frozen=True)
class _Point:
    """One conversion: by which method, at which widths, how much cache, what it cost.

    And on what, as far as that is known: the text, tokens scored, the original's perplexity there.
    """

    method: str
    widths: str
    share: float | None
    channels: float | None
    ratio: float
    error: float | None
    source: Document
    text: str | None = None
    tokens: float | None = None
    original: float | None = None


@dataclass(frozen=True)
class _Entry:
    """A method at one pair of widths and one place of the axis, over its seeds."""

    method: str
    widths: str
    x: float
    ratio: float
    error: float | None
    seeds: int


def quality(documents: Documents) -> Section | None:
    """Perplexity over the original's against the cache kept, a line a method, with the original and the paper's preset."""
    points = [*_cells(documents), *_benchmarks(documents), *_models(documents)]
    shares = [point for point in points if point.share is not None]
    by_share = len(shares) * 2 > len(points) or not any(point.channels for point in points)
    points = shares if by_share else [point for point in points if point.channels is not None]
    if not points:
        return None
    entries = _entries(points, by_share)
    lines = _lines(entries)
    if by_share:
        lines = [Line("original", [100.0], [1.0], role="original", dashed=True), *lines]
    common: dict[str, Any] = {
        "x_label": "share of the cache kept, %" if by_share else "channels cached per head, keys + values",
        "y_label": "perplexity over the original's",
        "level": 1.0,
        "sources": list({point.source.name: point.source for point in points}.values()),
    }
    note = "A line joins the best that so much cache, or less, can do; the table has all widths."
    table = _table(entries, by_share)
    blocks = [line_block("quality", "All of them", lines, log_y=True, note=note, table=table, **common)]
    close = [near for line in lines[:MOST_LINES] if (near := _near(line)) is not None]
    if max(entry.ratio for entry in entries) > 2 * _CLOSE and any(line.role != "original" for line in close):
        blocks.append(line_block("quality-close", f"Those up to ×{_CLOSE:g}", close, **common))
    lead = (
        "What a conversion costs: 1 is the original's perplexity. Over several seeds a point is their mean and ± the "
        f"standard error over them; of one seed ± is that of the measurement.{_apart(points)}"
    )
    found = tuple(block for block in blocks if block is not None)
    return Section("quality", "Quality against cache", lead, found)


def _cells(documents: Documents) -> list[_Point]:
    """Cells of the study of widths."""
    points = []
    for document in documents.of("study"):
        content = document.content
        if content.study != "widths":
            continue
        figures, settings = flat(content.figures), flat(content.settings)
        method = next(
            (settings[n] for n in ("preset", "method", "conversion.preset") if settings.get(n)), "calibrated"
        )
        tokens = sum(settings.get(f"stage{stage}_tokens") or 0 for stage in (1, 2))
        trained = f", trained on {tokens:,} tokens" if tokens else ""
        points += _point(f"{method}{trained}", settings, figures, document)
    return points


def _benchmarks(documents: Documents) -> list[_Point]:
    """Cells of the conversion benchmark; their names say the method, the widths and the seed."""
    points = []
    for document in documents.of("conversion"):
        content = document.content
        sided = [one for name, one in content.cells.items() if name.startswith(("keys-", "values-"))]
        known = [width for one in sided if (pair := widths_of(one)) for width in pair]
        head_dim = content.head_dim or (max(known) if known else _head_dim(documents))
        for name, one in content.cells.items():
            method = re.sub(r"-(\d+x\d+|seed\d+|\d+)(?=-|$)", "", name).replace("-", " ")
            points += _point(method, {"head_dim": head_dim, **flat(one)}, flat(one), document)
    return points


def _head_dim(documents: Documents) -> int | None:
    """Width of a head of the original, from a document that says it."""
    runs = [document.content.plan.get("head_dim") for document in documents.of("run")]
    models = [one.config.original_head_dim for one in measured_models(documents) if one.config is not None]
    return next((known for known in (*models, *runs) if isinstance(known, int)), None)


def _point(method: str, settings: dict[str, Any], figures: dict[str, Any], source: Document) -> list[_Point]:
    ratio, error = figures.get("ratio"), figures.get("ratio_standard_error")
    if not isinstance(ratio, (int, float)) or ratio <= 0:
        return []
    widths = widths_of(settings)
    return [
        _Point(
            method,
            f"{widths[0]:g}/{widths[1]:g}" if widths else "",
            cache_share(settings, figures),
            sum(widths) if widths else None,
            ratio,
            error if isinstance(error, (int, float)) else None,
            source,
            tokens=figures.get("tokens"),
            original=figures.get("original_perplexity"),
        )
    ]


def _models(documents: Documents) -> list[_Point]:
    """The models of evaluations and runs."""
    points = []
    for one in measured_models(documents):
        own, original = one.figures, one.original
        if (
            one.is_original
            or original is None
            or not (own.cache_bytes_per_token and original.cache_bytes_per_token)
        ):
            continue
        ratio = own.ratio
        if ratio is None and own.perplexity and original.perplexity:
            ratio = own.perplexity / original.perplexity
        if ratio:
            kept = own.cache_bytes_per_token / original.cache_bytes_per_token
            on = {"text": one.text, "tokens": own.tokens, "original": original.perplexity}
            points.append(
                _Point(one.label, "", kept, None, ratio, own.ratio_standard_error, one.source, **on)
            )
    return points


def _apart(points: Sequence[_Point]) -> str:
    """A sentence where the points are known to be of different texts, or of one text read in different ways."""
    texts, tokens, originals = (
        sorted({value for point in points if (value := getattr(point, name)) is not None})
        for name in ("text", "tokens", "original")
    )
    said = [f"{plain(tokens[0])} to {plain(tokens[-1])} tokens scored"] if len(tokens) > 1 else []
    if originals and originals[-1] > _SAME * originals[0]:
        said.append(f"the original's perplexity there {plain(originals[0])} to {plain(originals[-1])}")
    if not said and len(texts) < 2:
        return ""
    return (
        " The texts differ, or how they were read"
        + (f" ({', '.join(said)})" if said else "")
        + ": points compare only within one source."
    )


def _entries(points: Sequence[_Point], by_share: bool) -> list[_Entry]:
    """Points of one method and widths as one entry: they are its seeds."""
    seeds: dict[tuple[str, float, str], list[_Point]] = {}
    for point in points:
        x = point.share if by_share else point.channels
        assert x is not None
        place = (point.method, round(100 * x, 6) if by_share else x, point.widths)
        seeds.setdefault(place, []).append(point)
    entries = []
    for (method, x, widths), found in seeds.items():
        ratios = [point.ratio for point in found]
        error = standard_error(ratios) if len(found) > 1 else found[0].error
        entries.append(_Entry(method, widths, x, fmean(ratios), error, len(found)))
    return sorted(entries, key=lambda entry: (entry.method, -entry.x, entry.ratio))


def _table(entries: Sequence[_Entry], by_share: bool) -> Table:
    rows = []
    for one in entries:
        kept = share(one.x / 100) if by_share else cell(one.x)
        name = f"{one.method}, {one.widths}" if one.widths else one.method
        rows.append((name, [kept, cell(one.ratio, one.error), cell(one.seeds)]))
    columns = ["cache kept" if by_share else "channels", "perplexity over the original's", "seeds"]
    return Table.of("quality", "conversion, d_qk/d_vo", columns, rows, caption="Every conversion")


def _lines(entries: Sequence[_Entry]) -> list[Line]:
    """A line a method, those worth drawing first: the paper's, then those of three points or more, the best first."""
    made = []
    for method in dict.fromkeys(entry.method for entry in entries):
        best: dict[float, _Entry] = {}
        for one in entries:
            if one.method == method and (one.x not in best or one.ratio < best[one.x].ratio):
                best[one.x] = one
        at = frontier({x: one.ratio for x, one in best.items()})
        made.append(
            Line(
                "paper's preset" if method == "paper" else method,
                at,
                [best[x].ratio for x in at],
                error=[best[x].error for x in at],
                role="c2" if method == "paper" else "",
            )
        )
    made.sort(key=lambda line: (line.role != "c2", -min(len(line.x), 3), fmean(line.y)))
    free = iter(("c1", "c3", "c4", "c5", "muted"))  # a method keeps its colour on both scales
    made = [line if line.role else replace(line, role=next(free, "muted")) for line in made]
    return made


def _near(line: Line) -> Line | None:
    """The points of a line up to `_CLOSE`."""
    kept = [index for index, y in enumerate(line.y) if y <= _CLOSE]
    if not kept:
        return None
    error = line.error and [line.error[index] for index in kept]
    return replace(line, x=[line.x[i] for i in kept], y=[line.y[i] for i in kept], error=error)
