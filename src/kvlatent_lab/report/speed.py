"""The section on speed: times and bytes against context, and what bytes alone predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

from kvlatent_lab.report.bench_shapes import BenchRatio, BenchRow
from kvlatent_lab.report.blocks import Block, Section, line_block
from kvlatent_lab.report.charts import MOST_LINES, Line
from kvlatent_lab.report.html_tables import Table, cell, share, words
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["speed"]

_COLUMNS = (
    ("prefill, s", "prefill_s"),
    ("decode, ms per token", "decode_ms_per_token"),
    ("tokens per second", "tokens_per_s"),
    ("cache, bytes", "cache_bytes"),
    ("peak, bytes", "peak_bytes"),
)


def speed(documents: Documents) -> Section | None:
    """Decoding, prefill and how many times faster the latent model is, measured and predicted, for every bench."""
    benches = documents.of("bench")
    blocks: list[Block | None] = []
    for document in benches:
        blocks += _bench(document, "" if len(benches) == 1 else f" ({document.name})")
    lead = (
        "Original and latent model take turns in one process; medians, bands are quartiles. The prediction is the "
        "roofline's: a step of decoding reads the weights and the whole cache once, and nothing else counts."
    )
    setups = "; ".join(
        dict.fromkeys(document.content.setup for document in benches if document.content.setup)
    )
    lead += f" Measured: {setups}." if setups else ""
    found = tuple(block for block in blocks if block is not None)
    return Section("speed", "Speed against context", lead, found) if found else None


def _bench(document: Document, where: str) -> list[Block | None]:
    bench = document.content
    batches = sorted({row.batch for row in bench.rows})
    ends = batches if len(batches) < 3 else [batches[0], batches[-1]]
    blocks: list[Block | None] = []
    for batch in ends:
        named = f", batch {batch}{where}"
        rows = [row for row in bench.rows if row.batch == batch]
        ratios = [ratio for ratio in bench.ratios if ratio.batch == batch]
        stacked = [ratio for ratio in bench.stacked if ratio.batch == batch]
        blocks.append(_ratios(document, ratios, f"faster-{batch}", f"How many times faster a step is{named}"))
        if len({ratio.cache for ratio in stacked}) > 1:
            blocks.append(
                _stacked(document, stacked, f"stacked-{batch}", f"Narrower, quantised, and both{named}")
            )
        blocks.append(_times(document, rows, f"decode-{batch}", f"Decoding{named}", _COLUMNS[1]))
        blocks.append(_times(document, rows, f"prefill-{batch}", f"Prefill{named}", _COLUMNS[0]))
    return [*blocks, _everything(document, where), _longest(document, where)]


def _times(
    document: Document, rows: Sequence[BenchRow], name: str, title: str, column: tuple[str, str]
) -> Block | None:
    """One kind of time against context, a line a model and cache."""
    y_label, key = column
    kinds = list(dict.fromkeys((row.model, row.cache) for row in rows))
    lines = [
        _line(
            _named(model, cache, [c for _, c in kinds]),
            [r for r in rows if (r.model, r.cache) == (model, cache)],
            key,
        )
        for model, cache in kinds
    ]
    lines = [
        replace(line, role="original", dashed=True) if kind == ("original", kinds[0][1]) else line
        for line, kind in zip(lines, kinds, strict=True)
    ]
    return _block(document, name, title, lines, y_label, log_y=True)


def _named(model: str, cache: str, caches: Sequence[str]) -> str:
    return f"{model}, {cache}" if len(set(caches)) > 1 else model


def _line(label: str, rows: Sequence[BenchRow] | Sequence[BenchRatio], key: str, **style: Any) -> Line:
    """A figure against context, with its quartiles as a band where every point has them."""
    known = sorted((row for row in rows if getattr(row, key) is not None), key=lambda row: row.context)
    quartiles = [found for row in known if (found := getattr(row, f"{key}_quartiles", None)) is not None]
    whole = len(quartiles) == len(known)
    band = ([low for low, _ in quartiles], [high for _, high in quartiles]) if whole else None
    return Line(
        label, [row.context for row in known], [getattr(row, key) for row in known], band=band, **style
    )


def _ratios(document: Document, ratios: Sequence[BenchRatio], name: str, title: str) -> Block | None:
    """Latent against original with the same cache; the prediction dashed in the colour of what it predicts."""
    lines = []
    caches = list(dict.fromkeys(ratio.cache for ratio in ratios))
    for cache, role in zip(caches, cycle(("c1", "c2", "c3", "c4", "c5")), strict=False):
        rows = [ratio for ratio in ratios if ratio.cache == cache]
        for label, key, dashed in (("measured", "decode", False), ("predicted", "predicted_decode", True)):
            named = _named(label, cache, caches)
            lines.append(_line(named, rows, key, role=role, dashed=dashed, marks=not dashed))
    return _block(
        document, name, title, lines, "times faster than the original with the same cache", level=1.0
    )


def _stacked(document: Document, stacked: Sequence[BenchRatio], name: str, title: str) -> Block | None:
    """Every model with every cache against the first of them; predictions dashed, where there is room for them."""
    kinds = list(dict.fromkeys((ratio.model, ratio.cache) for ratio in stacked))
    lines, predicted = [], []
    for (model, cache), role in zip(kinds[1:], cycle(("c1", "c2", "c3", "c4", "c5")), strict=False):
        rows = [ratio for ratio in stacked if (ratio.model, ratio.cache) == (model, cache)]
        label, dashed = f"{model}, {cache}", {"role": role, "dashed": True, "marks": False}
        lines.append(_line(label, rows, "decode", role=role))
        predicted.append(replace(_line(f"{label}, predicted", rows, "predicted_decode"), **dashed))
    lines += predicted if len(lines) + len(predicted) <= MOST_LINES else []
    against = ", ".join(kinds[0])
    table = _stacked_table(f"{name}-{document.name}", stacked, f"against {against}")
    return _block(document, name, title, lines, f"times faster than {against}", level=1.0, table=table)


def _stacked_table(name: str, stacked: Sequence[BenchRatio], caption: str) -> Table:
    """What was measured of every kind of cache, what its bytes predict, and its share of the bytes."""
    columns = ("times faster", "lower", "upper", "predicted by bytes", "share of the cache")
    rows = []
    for one in sorted(stacked, key=lambda one: one.context):
        low, high = one.decode_quartiles or (None, None)
        times = [cell(value) for value in (one.decode, low, high, one.predicted_decode)]
        head = f"{one.model}, {one.cache}, context {one.context:,}"
        rows.append((head, [*times, share(one.cache_bytes)]))
    return Table.of(name, "model, cache", columns, rows, caption=caption)


def _block(
    document: Document, name: str, title: str, lines: Sequence[Line], y_label: str, **options: Any
) -> Block | None:
    """A chart against context."""
    places = sorted({x for line in lines for x in line.x})
    ticks = places[:: max(1, -(-len(places) // 6))]
    common: dict[str, Any] = {
        "x_label": "context, tokens",
        "log_x": True,
        "x_ticks": ticks,
        "sources": [document],
    }
    return line_block(f"{name}-{document.name}", title, lines, y_label=y_label, **common, **options)


def _everything(document: Document, where: str) -> Block:
    """All rows as they were measured."""
    bench = document.content
    rows = [
        (
            f"{row.model}, {row.cache}, batch {row.batch}, context {row.context:,}",
            [cell(getattr(row, key)) for _, key in _COLUMNS],
        )
        for row in bench.rows
    ]
    table = Table.of(
        f"bench-{document.name}", "model, cache", [label for label, _ in _COLUMNS], rows, caption=bench.setup
    )
    return Block(f"All measurements{where}", (table,), sources=(document,), wide=True)


def _longest(document: Document, where: str) -> Block | None:
    """Longest contexts in a memory."""
    largest = document.content.largest_context
    if largest is None or not largest.rows:
        return None
    rows = [
        (
            f"{row.model}, {row.cache}, batch {row.batch}",
            [words("no limit") if row.tokens is None else cell(row.tokens)],
        )
        for row in largest.rows
    ]
    caption = (
        ""
        if largest.memory_bytes is None
        else f"in {largest.memory_bytes / 1e9:,.4g} GB, weights and cache alone"
    )
    table = Table.of(f"longest-{document.name}", "model, cache", ["tokens"], rows, caption=caption)
    return Block(f"Longest context{where}", (table,), sources=(document,))
