"""A bench document as text: a card, a table, and one line of JSON. Pure functions of the document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["bench_card", "bench_lines", "bench_listing", "json_line"]

_COLUMNS = ("batch", "context", "cache", "model", "prefill", "ms/token", "tokens/s", "cache held", "peak", "times faster", "by bytes")  # fmt: skip


def json_line(document: dict[str, Any]) -> str:
    """The document as one line of JSON.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def bench_lines(document: dict[str, Any]) -> list[str]:
    """Card, table, and what follows it: longest contexts, and what ran out of memory."""
    table = _aligned(bench_listing(document))
    lines = [*bench_card(document), "", *table]
    if document["largest_context"] is not None:
        lines += ["", *_largest(document["largest_context"])]
    for row in document["skipped"]:
        lines.append(f"not measured: {_place(row)}, {row['model']}: {row['reason']}")
    return lines


def bench_card(document: dict[str, Any]) -> list[str]:
    """What was measured, where and how; a line each."""
    settings, machine = document["settings"], document["record"]["machine"]
    lines = [
        _about(role, document[key])
        for role, key in (("model", "model"), ("original", "original"))
        if document[key]
    ]
    where = machine["accelerator"] or f"{machine['processor']}, torch threads: {machine['torch_threads']}"
    compiled = ", compiled step" if document["compile"] else ""
    return [
        *lines,
        f"{document['device']} ({where}), {document['dtype']}, {document['attention']}{compiled}",
        f"medians and quartiles of {settings['repeats']} rounds by turns, {settings['new_tokens']} tokens added",
        "times faster: a step, against the original with the same cache (the original: with the first)",
        "by bytes: the bound of it",
        f"peak memory: {document['peak_memory']}",
    ]


def _about(role: str, about: dict[str, Any]) -> str:
    widths = " and ".join(f"{name} {_range(about[name])}" for name in ("d_qk", "d_vo"))
    return f"{role}: {about['name']}, weights {_bytes(about['weight_bytes'])}, {widths}"


def _range(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def bench_listing(document: dict[str, Any]) -> list[list[str]]:
    """Header and rows.

    The columns "times faster" (of a step, with quartiles) and "by bytes" (its bound) compare a latent model with the
    original under the same cache, and the original, or a model measured alone, with itself under the first cache.
    """
    first, single = document["settings"]["caches"][0], document["original"] is None
    ratios = {(row["batch"], row["context"], row["cache"], "latent"): row for row in document["ratios"]}
    ratios |= {
        (row["batch"], row["context"], row["cache"], row["model"]): row
        for row in document["stacked"]
        if row["cache"] != first and (single or row["model"] == "original")
    }
    table = [list(_COLUMNS)]
    for row in document["rows"]:
        ratio = ratios.get((row["batch"], row["context"], row["cache"], row["model"]))
        faster, bound = "", ""
        if ratio is not None:
            low, high = ratio["decode_quartiles"]
            faster, bound = (
                f"{ratio['decode']:.2f} ({low:.2f} to {high:.2f})",
                f"{ratio['predicted_decode']:.2f}",
            )
        low, high = row["decode_ms_per_token_quartiles"]
        table.append(
            [
                str(row["batch"]),
                f"{row['context']:,}",
                row["cache"],
                row["model"],
                f"{row['prefill_s']:.3g} s",
                f"{row['decode_ms_per_token']:.3g} ({low:.3g} to {high:.3g})",
                f"{row['tokens_per_s']:,.4g}",
                _bytes(row["cache_bytes"]),
                "" if row["peak_bytes"] is None else _bytes(row["peak_bytes"]),
                faster,
                bound,
            ]
        )
    return table


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = {_COLUMNS.index(name) for name in ("cache", "model")}
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _largest(document: dict[str, Any]) -> list[str]:
    lines = [f"longest context in {_bytes(document['memory_bytes'])}, weights and cache alone:"]
    for row in document["rows"]:
        tokens = "no limit" if row["tokens"] is None else f"{row['tokens']:,} tokens"
        lines.append(f"  batch {row['batch']}, {row['cache']}, {row['model']}: {tokens}")
    return lines


def _place(row: dict[str, Any]) -> str:
    return f"batch {row['batch']}, context {row['context']:,}, {row['cache']}"


def _bytes(size: float) -> str:
    """A size with three digits, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 999.5 else f"{size:,.0f} GB"
