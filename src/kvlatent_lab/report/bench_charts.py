"""The section on speed: times and bytes against context, and what bytes alone predict."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pandas as pd

from kvlatent.evaluation.result_models import Bench
from kvlatent_lab.report.blocks import Block, Section, line_block, section
from kvlatent_lab.report.charts import MOST_LINES, Line, points
from kvlatent_lab.report.page_listings import Listing, entry, share, words
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["speed"]

_COLUMNS = {
    "prefill_s": "prefill, s",
    "decode_ms_per_token": "decode, ms per token",
    "tokens_per_s": "tokens per second",
    "cache_bytes": "cache, bytes",
    "peak_bytes": "peak, bytes",
}
_ROLES = ("c1", "c2", "c3", "c4", "c5")
_PREDICTED: dict[str, Any] = {"dashed": True, "marks": False}


def speed(documents: Documents) -> Section | None:
    """Decoding, prefill and how many times faster the latent model is, measured and predicted, for every bench."""
    benches = documents.of("bench")
    blocks: list[Block | None] = []
    for document in benches:
        where = "" if len(benches) == 1 else f" ({document.name})"
        blocks += [*_charts(document, where), _everything(document, where), _longest(document, where)]
    setups = dict.fromkeys(_setup(one.content) for one in benches)
    lead = (
        "Original and latent model take turns in one process; medians, bands are quartiles. The prediction is the "
        "roofline's: a step of decoding reads the weights and the whole cache once, and nothing else counts."
        + (f" Measured: {'; '.join(setups)}." if setups else "")
    )
    return section("speed", "Speed against context", lead, blocks)


def _setup(bench: Bench) -> str:
    """What was run on what."""
    compiled = "step compiled" if bench.compile else "step not compiled"
    random = any(one is not None and one.random_weights for one in (bench.model, bench.original))
    setup = f"{bench.device}, {bench.dtype}, {bench.attention} attention, {compiled}"
    return f"{setup}, random weights" if random else setup


def _charts(document: Document, where: str) -> list[Block | None]:
    """Four charts a batch, of the smallest and the largest where there are many."""
    bench, blocks = document.content, []
    rows, ratios, stacked = (_frame(rows) for rows in (bench.rows, bench.ratios, bench.stacked))
    batches = sorted(set(rows["batch"]))
    for batch in batches if len(batches) < 3 else [batches[0], batches[-1]]:
        named, one = (
            f", batch {batch}{where}",
            [each[each["batch"] == batch] if len(each) else each for each in (rows, ratios, stacked)],
        )
        blocks += [
            _ratios(document, one[1], f"faster-{batch}", f"How many times faster a step is{named}"),
            _stacked(document, one[2], f"stacked-{batch}", f"Narrower, quantised, and both{named}"),
            _times(document, one[0], f"decode-{batch}", f"Decoding{named}", "decode_ms_per_token"),
            _times(document, one[0], f"prefill-{batch}", f"Prefill{named}", "prefill_s"),
        ]
    return blocks


def _frame(rows: list[Any]) -> pd.DataFrame:
    """Rows of a bench with their kind, model and cache; quartiles as two columns each."""
    frame = pd.DataFrame([row.model_dump() | {"kind": f"{row.model}, {row.cache}"} for row in rows])
    for name in [name for name in frame if name.endswith("_quartiles")]:
        frame[f"{name} lower"], frame[f"{name} upper"] = zip(*frame[name], strict=True)
    return frame


def _kinds(rows: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    return {f"{kind}": each for kind, each in rows.groupby(column, sort=False)} if len(rows) else {}


def _line(label: str, rows: pd.DataFrame, column: str, **style: Any) -> Line:
    """A figure against context, with its quartiles as a band."""
    band = [rows.get(f"{column}_quartiles {end}") for end in ("lower", "upper")]
    return Line(label, points(rows["context"], rows[column], None, *band), **style)


def _times(document: Document, rows: pd.DataFrame, name: str, title: str, column: str) -> Block | None:
    """One kind of time against context, a line a model and cache."""
    lines = []
    for kind, each in _kinds(rows, "kind" if rows["cache"].nunique() > 1 else "model").items():
        first = kind.startswith("original") and each.iloc[0]["cache"] == rows.iloc[0]["cache"]
        lines.append(_line(kind, each, column, role="original" if first else "", dashed=first))
    return _block(document, name, title, lines, _COLUMNS[column], log_y=True)


def _ratios(document: Document, ratios: pd.DataFrame, name: str, title: str) -> Block | None:
    """Latent against original with the same cache; the prediction dashed in the colour of what it predicts."""
    lines = []
    caches = _kinds(ratios, "cache")
    for (cache, rows), role in zip(caches.items(), cycle(_ROLES), strict=False):
        of = f", {cache}" if len(caches) > 1 else ""
        lines.append(_line(f"measured{of}", rows, "decode", role=role))
        lines.append(_line(f"predicted{of}", rows, "predicted_decode", role=role, **_PREDICTED))
    y_label = "times faster than the original with the same cache"
    return _block(document, name, title, lines, y_label, level=1.0)


def _stacked(document: Document, stacked: pd.DataFrame, name: str, title: str) -> Block | None:
    """Every model with every cache against the first of them; predictions dashed, where there is room for them."""
    if not len(stacked) or stacked["cache"].nunique() < 2:
        return None
    (against, _), *kinds = _kinds(stacked, "kind").items()
    lines, predicted = [], []
    for (kind, rows), role in zip(kinds, cycle(_ROLES), strict=False):
        lines.append(_line(kind, rows, "decode", role=role))
        predicted.append(_line(f"{kind}, predicted", rows, "predicted_decode", role=role, **_PREDICTED))
    lines += predicted if len(lines) + len(predicted) <= MOST_LINES else []
    columns = ("times faster", "lower", "upper", "predicted by bytes", "share of the cache")
    measured = ("decode", "decode_quartiles lower", "decode_quartiles upper", "predicted_decode")
    rows = [
        (
            f"{one['kind']}, context {one['context']:,}",
            [*(entry(one[column]) for column in measured), share(one["cache_bytes"])],
        )
        for one in stacked.sort_values("context", kind="stable").to_dict("records")
    ]
    listing = Listing.of(
        f"{name}-{document.name}", "model, cache", columns, rows, caption=f"against {against}"
    )
    return _block(document, name, title, lines, f"times faster than {against}", level=1.0, listing=listing)


def _block(
    document: Document, name: str, title: str, lines: list[Line], y_label: str, **options: Any
) -> Block | None:
    """A chart against context."""
    common: dict[str, Any] = {
        "x_label": "context, tokens",
        "log_x": True,
        "at_points": True,
        "sources": [document],
    }
    return line_block(f"{name}-{document.name}", title, lines, y_label=y_label, **common, **options)


def _everything(document: Document, where: str) -> Block:
    """All rows as they were measured."""
    bench = document.content
    rows = [
        (
            f"{row.model}, {row.cache}, batch {row.batch}, context {row.context:,}",
            [entry(getattr(row, column)) for column in _COLUMNS],
        )
        for row in bench.rows
    ]
    columns = list(_COLUMNS.values())
    listing = Listing.of(f"bench-{document.name}", "model, cache", columns, rows, caption=_setup(bench))
    return Block(f"All measurements{where}", (listing,), sources=(document,), wide=True)


def _longest(document: Document, where: str) -> Block | None:
    """Longest contexts in a memory."""
    largest = document.content.largest_context
    if largest is None or not largest.rows:
        return None
    rows = [
        (
            f"{one.model}, {one.cache}, batch {one.batch}",
            [words("no limit") if one.tokens is None else entry(one.tokens)],
        )
        for one in largest.rows
    ]
    caption = f"in {largest.memory_bytes / 1e9:,.4g} GB, weights and cache alone"
    listing = Listing.of(f"longest-{document.name}", "model, cache", ["tokens"], rows, caption=caption)
    return Block(f"Longest context{where}", (listing,), sources=(document,))
