"""The section on quality against cache: every conversion that any document knows, on one pair of axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from kvlatent_lab.report.blocks import Section, line_block, section
from kvlatent_lab.report.charts import MOST_LINES, Line, points
from kvlatent_lab.report.measured_models import measured_models
from kvlatent_lab.report.page_listings import Listing, entry, plain, share
from kvlatent_lab.report.result_files import Document, Documents
from kvlatent_lab.report.study_groups import frontier

__all__ = ["quality"]

_CLOSE = 1.5
"""Ratios up to here are shown a second time, on a scale of their own."""

_SAME = 1.001
"""Perplexities of one model on one text are equal up to this factor, whatever the machine."""

_NUMBERS = ("kept", "channels", "ratio", "error", "tokens", "original")
_COLUMNS = ("method", "widths", "source", "text", *_NUMBERS)


def quality(documents: Documents) -> Section | None:
    """Perplexity over the original's against the cache kept, a line a method, with the original and the paper's preset."""
    rows = [*_cells(documents.of("study")), *_benchmarks(documents), *_models(documents)]
    conversions = pd.DataFrame(rows, columns=pd.Index(_COLUMNS)).astype(dict.fromkeys(_NUMBERS, float))
    conversions = conversions.dropna(subset=["ratio"])
    by_share = (
        conversions["kept"].notna().sum() * 2 > len(conversions) or conversions["channels"].isna().all()
    )
    conversions = conversions.dropna(subset=["kept" if by_share else "channels"])
    if conversions.empty:
        return None
    x = (100 * conversions["kept"]).round(6) if by_share else conversions["channels"]
    means = conversions.groupby(["method", x.rename("x"), "widths"])
    entries = means.agg(ratio=("ratio", "mean"), error=("ratio", "sem"), seeds=("ratio", "size"))
    entries["error"] = entries["error"].fillna(means["error"].first())
    entries = entries.reset_index().sort_values(["method", "x", "ratio"], ascending=[True, False, True])
    lines = _lines(entries)
    if by_share:
        lines = [Line("original", points([100.0], [1.0]), "original", dashed=True), *lines]
    sources: dict[str, Document] = {one.name: one for one in conversions["source"]}
    common: dict[str, Any] = {
        "x_label": "share of the cache kept, %" if by_share else "channels cached per head, keys + values",
        "y_label": "perplexity over the original's",
        "level": 1.0,
        "sources": list(sources.values()),
    }
    note = "A line joins the best that so much cache, or less, can do; the listing has all widths."
    listing = _listing(entries, by_share)
    blocks = [line_block("quality", "All of them", lines, log_y=True, note=note, listing=listing, **common)]
    near = [replace(one, points=one.points[one.points["y"] <= _CLOSE]) for one in lines[:MOST_LINES]]
    if entries["ratio"].max() > 2 * _CLOSE and any(len(one.points) for one in near if one.role != "original"):
        blocks.append(line_block("quality-close", f"Those up to ×{_CLOSE:g}", near, **common))
    lead = (
        "What a conversion costs: 1 is the original's perplexity. Over several seeds a point is their mean and ± the "
        f"standard error over them; of one seed ± is that of the measurement.{_differences(conversions)}"
    )
    return section("quality", "Quality against cache", lead, blocks)


def _cells(studies: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Cells of the studies of widths and of conversions; names of the latter say the method, the widths and the seed."""
    for one in (one for one in studies if one.content.study in ("widths", "conversion")):
        figures, settings = one.content.figures, one.content.settings
        tokens, widths = settings.tokens, one.content.study == "widths"
        method = settings.preset or "calibrated" if widths else _method(one.content.cell)
        yield {
            "method": f"{method}, trained on {tokens:,} tokens" if tokens else method,
            "kept": figures.cache_ratio,
            **_widths(settings.d_qk, settings.d_vo),
            "ratio": figures.ratio,
            "error": figures.ratio_standard_error,
            "source": one,
            "tokens": figures.tokens,
            "original": figures.original_perplexity,
        }


def _method(cell: str) -> str:
    return re.sub(r"-(\d+x\d+|seed\d+|\d+)(?=-|$)", "", cell).replace("-", " ")


def _benchmarks(documents: Documents) -> Iterator[dict[str, Any]]:
    """Cells of the conversion benchmark; their names say the method, the widths and the seed."""
    for document in documents.of("conversion"):
        cells = document.content.cells
        sided = [one for name, one in cells.items() if name.startswith(("keys-", "values-"))]
        whole = [width for one in sided for width in (one.d_qk, one.d_vo) if isinstance(width, int)]
        head_dim = max(whole) if whole else _head_dim(documents)
        for name, one in cells.items():
            widths = _widths(one.d_qk, one.d_vo)
            yield {
                "method": _method(name),
                "kept": widths["channels"] / (2 * head_dim) if widths["channels"] and head_dim else None,
                **widths,
                "ratio": one.ratio,
                "error": one.ratio_standard_error,
                "source": document,
                "tokens": one.tokens,
                "original": one.original_perplexity,
            }


def _widths(d_qk: Any, d_vo: Any) -> dict[str, Any]:
    """Both widths, where they are one number each."""
    known = isinstance(d_qk, int | float) and isinstance(d_vo, int | float)
    return {"widths": f"{d_qk:g}/{d_vo:g}" if known else "", "channels": d_qk + d_vo if known else None}


def _head_dim(documents: Documents) -> int | None:
    """Width of a head of the original, from a document that says it."""
    models = [one.config.original_head_dim for one in measured_models(documents) if one.config is not None]
    runs = [run.content.plan.get("head_dim") for run in documents.of("run")]
    return next((known for known in (*models, *runs) if isinstance(known, int)), None)


def _models(documents: Documents) -> Iterator[dict[str, Any]]:
    """The models of evaluations and runs."""
    for one in measured_models(documents):
        if one.kept is not None:
            yield {
                "method": one.label,
                "widths": "",
                "kept": one.kept,
                "ratio": one.over_original,
                "error": one.ratio_standard_error,
                "source": one.source,
                "text": one.text,
                "tokens": one.figures.tokens,
                "original": one.original and one.original.perplexity,
            }


def _differences(conversions: pd.DataFrame) -> str:
    """A sentence where the points are known to be of different texts, or of one text read in different ways."""
    texts, tokens, originals = (
        sorted(conversions[name].dropna().unique()) for name in ("text", "tokens", "original")
    )
    said = [f"{plain(tokens[0])} to {plain(tokens[-1])} tokens scored"] if len(tokens) > 1 else []
    if originals and originals[-1] > _SAME * originals[0]:
        said.append(f"the original's perplexity there {plain(originals[0])} to {plain(originals[-1])}")
    if not said and len(texts) < 2:
        return ""
    how = f" ({', '.join(said)})" if said else ""
    return f" The texts differ, or how they were read{how}: points compare only within one source."


def _listing(entries: pd.DataFrame, by_share: bool) -> Listing:
    rows = []
    for one in entries.to_dict("records"):
        name = f"{one['method']}, {one['widths']}" if one["widths"] else one["method"]
        kept = share(one["x"] / 100) if by_share else entry(one["x"])
        rows.append((name, [kept, entry(one["ratio"], one["error"]), entry(one["seeds"])]))
    columns = ["cache kept" if by_share else "channels", "perplexity over the original's", "seeds"]
    return Listing.of("quality", "conversion, d_qk/d_vo", columns, rows, caption="Every conversion")


def _lines(entries: pd.DataFrame) -> list[Line]:
    """A line a method, those worth drawing first: the paper's, then those of three points or more, the best first."""
    lines = []
    for method, rows in entries.groupby("method", sort=False):
        best = rows.drop_duplicates("x").set_index(
            "x"
        )  # the entries of a place are in the order of their ratios
        best = best.loc[frontier(best["ratio"]).index]
        drawn = points(best.index, best["ratio"], best["error"])
        paper = method == "paper"
        lines.append(Line("paper's preset" if paper else f"{method}", drawn, "c2" if paper else ""))
    lines.sort(key=lambda line: (line.role != "c2", -min(len(line.points), 3), line.points["y"].mean()))
    free = iter(("c1", "c3", "c4", "c5", "muted"))  # a method keeps its colour on both scales
    return [line if line.role else replace(line, role=next(free, "muted")) for line in lines]
