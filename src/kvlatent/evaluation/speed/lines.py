"""A bench document as text: a card, a listing, and one line of JSON. Pure functions of the document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvlatent.evaluation.result_models import Bench, LongestContexts, ModelIdentity

__all__ = ["bench_card", "bench_lines", "bench_listing", "json_line"]

_COLUMNS = ("batch", "context", "cache", "model", "prefill", "ms/token", "tokens/s", "cache held", "peak", "bound", "times faster", "by bytes")  # fmt: skip


def json_line(document: dict[str, Any]) -> str:
    """The document as one line of JSON.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def bench_lines(document: dict[str, Any]) -> list[str]:
    """Card, listing, and what follows it: longest contexts, and what ran out of memory."""
    bench = Bench.model_validate(document)
    lines = [*bench_card(bench), "", *_aligned(bench_listing(bench))]
    if bench.largest_context is not None:
        lines += ["", *_largest(bench.largest_context)]
    for row in bench.skipped:
        place = f"batch {row.batch}, context {row.context:,}, {row.cache}"
        lines.append(f"not measured: {place}, {row.model}: {row.reason}")
    return lines


def bench_card(bench: Bench) -> list[str]:
    """What was measured, where and how; a line each."""
    settings, machine = bench.settings, bench.record.machine
    models = {"model": bench.model, "original": bench.original}
    where = machine["accelerator"] or f"{machine['processor']}, torch threads: {machine['torch_threads']}"
    if bench.engine is not None:
        where = f"{machine['processor']}, threads: {machine['engine_threads']}"
    compiled = ", compiled step" if bench.compile else ""
    return [
        *(_about(role, one) for role, one in models.items() if one is not None),
        f"{bench.device} ({where}), {bench.dtype}, {bench.attention}{compiled}",
        f"medians and quartiles of {settings.repeats} rounds by turns, {settings.new_tokens} tokens added",
        "times faster: a step, against the original with the same cache (the original: with the first)",
        "by bytes: the bound of it",
        *([] if bench.engine is None else [_about_engine(bench)]),
        *([] if bench.engine is not None else [f"peak memory: {bench.peak_memory}"]),
    ]


def _about_engine(bench: Bench) -> str:
    rate = bench.read_bytes_per_s or 0
    return f"{bench.engine}; memory is read at {_bytes(rate)}/s here, and the column bound is the bytes of a step at that"


def _about(role: str, about: ModelIdentity) -> str:
    widths = f"d_qk {_range(about.d_qk or [])} and d_vo {_range(about.d_vo or [])}"
    return f"{role}: {about.name}, weights {_bytes(about.weight_bytes or 0)}, {widths}"


def _range(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def bench_listing(bench: Bench) -> list[list[str]]:
    """Header and rows.

    The columns "times faster" (of a step, with quartiles) and "by bytes" (its bound) compare a latent model with the
    original under the same cache, and the original, or a model measured alone, with itself under the first cache.
    """
    first, single = bench.settings.caches[0], bench.original is None
    ratios = {(row.batch, row.context, row.cache, "latent"): row for row in bench.ratios}
    ratios |= {
        (row.batch, row.context, row.cache, row.model): row
        for row in bench.stacked
        if row.cache != first and (single or row.model == "original")
    }
    own = bench.engine is None
    unused = _COLUMNS.index(
        "bound" if own else "peak"
    )  # what is not measured of our own runtime, or of another's
    listing = [list(_COLUMNS)]
    for row in bench.rows:
        ratio = ratios.get((row.batch, row.context, row.cache, row.model))
        faster, bound = "", ""
        if ratio is not None:
            low, high = ratio.decode_quartiles
            faster, bound = f"{ratio.decode:.2f} ({low:.2f} to {high:.2f})", f"{ratio.predicted_decode:.2f}"
        low, high = row.decode_ms_per_token_quartiles
        listing.append(
            [
                str(row.batch),
                f"{row.context:,}",
                row.cache,
                row.model,
                f"{row.prefill_s:.3g} s",
                f"{row.decode_ms_per_token:.3g} ({low:.3g} to {high:.3g})",
                f"{row.tokens_per_s:,.4g}",
                _bytes(row.cache_bytes),
                "" if row.peak_bytes is None else _bytes(row.peak_bytes),
                "" if row.bound_ms_per_token is None else f"{row.bound_ms_per_token:.3g} ms",
                faster,
                bound,
            ]
        )
    return [[cell for place, cell in enumerate(row) if place != unused] for row in listing]


def _aligned(listing: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*listing, strict=True)]
    left = {_COLUMNS.index(name) for name in ("cache", "model")}  # before what may be left out
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in listing
    ]


def _largest(longest: LongestContexts) -> list[str]:
    lines = [f"longest context in {_bytes(longest.memory_bytes)}, weights and cache alone:"]
    for row in longest.rows:
        tokens = "no limit" if row.tokens is None else f"{row.tokens:,} tokens"
        lines.append(f"  batch {row.batch}, {row.cache}, {row.model}: {tokens}")
    return lines


def _bytes(size: float) -> str:
    """A size with three digits, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 999.5 else f"{size:,.0f} GB"
