"""How plans for a budget look to people: a share of the cache, or bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from .listings import list_pairs, widths_text


def budget_listing(document: Mapping[str, Any]) -> list[Any]:
    """A plan for a budget: the curve with the chosen row marked, then what the widths are worth."""
    plan, serving = document["plan"], document["serving"]
    curve = Table(box=box.SIMPLE_HEAD)
    for name in ("cache kept", "d_qk", "d_vo", "predicted error", "d_qk = d_vo", "its error"):
        curve.add_column(name, justify="right")
    for row in document["curve"]:
        curve.add_row(
            f"{row['kv']:.1%}",
            *(str(row[name]) for name in ("d_qk", "d_vo")),
            f"{row['error']:.5f}",
            str(row["symmetric_width"]),
            f"{row['symmetric_error']:.5f}",
        )
    size, error = serving["cache_bytes_per_token"], plan["predicted_error"]
    facts = {
        "widths": f"d_qk {widths_text(plan['d_qk'])}, d_vo {widths_text(plan['d_vo'])} of {plan['head_dim']} a head",
        "cache": f"{size['latent']:,.0f} of {size['original']:,.0f} bytes per token: {size['share']:.1%}",
        "predicted error": f"{error['total']:.5f} (keys {error['keys']:.5f}, values {error['values']:.5f}), "
        f"{error['unit']}",
    }
    for row in serving.get("maximum_context", ()):
        name = f"longest context, batch {row['batch']}"
        facts[name] = f"{_context(row['original'])} -> {_context(row['latent'])} tokens"
    for row in serving["decode_speedup"]:
        name = f"decoding, {row['context']:,} tokens, batch {row['batch']}"
        facts[name] = f"x{row['speedup']:.2f} at the most (by bytes read)"
    for scope, names in plan["engines"].items():
        facts[f"engines, one rotary table per {scope}"] = ", ".join(names) or "none"
    drawn = [f"drawn in {document['figure']}"] if document["figure"] else []
    return [curve, list_pairs(facts), *drawn]


def _context(tokens: int | None) -> str:
    return "any number of" if tokens is None else f"{tokens:,}"


def bytes_listing(document: Mapping[str, Any]) -> list[Any]:
    """Widths x KV dtypes that fit so many bytes, whose losses were measured on what, and what does not fit."""
    budget, engine = document["budget"], document["engine"] or "kvlatent's own runtime, on transformers"
    on = "" if document["backend"] == "any" else f" on {document['backend']}"
    sequences = "" if budget["batch"] == 1 else f"{budget['batch']} x "
    title = (
        f"{engine}{on}, {sequences}{budget['context']:,} tokens of context in {_size(budget['kv_bytes'])} of cache, "
        f"head width {document['head_dim']}, one rotary table per {document['table']}"
    )
    listing = Table(box=box.SIMPLE_HEAD)
    has_text = document["calibration"] is not None
    listing.add_column("d_qk/d_vo")
    listing.add_column("KV dtype")
    predicted = ["predicted loss of the widths, nats"] if has_text else []
    for name in (
        "cache",
        "of 16 bits",
        "longest context",
        "decoding, at the most",
        *predicted,
        "measured loss",
    ):
        listing.add_column(name, justify="right")
    for row in document["options"]:
        loss = row["loss"]
        listing.add_row(
            f"{widths_text(row['d_qk'])}/{widths_text(row['d_vo'])}",
            row["kv_dtype"],
            _size(row["bytes"]),
            f"{row['share']:.1%}",
            _context(row["maximum_context"]),
            f"x{row['decode_speedup']:.2f}",
            *([f"{loss['predicted']:.4f}"] if has_text else []),
            _measured(loss),
        )
    return [
        title,
        *document["notes"],
        listing,
        *_loss_lines(document),
        *_refusal_lines(document),
        *_note_lines(document),
    ]


def _measured(loss: Mapping[str, Any]) -> str:
    """The least loss that was measured, without training where there is one."""
    if loss["is_original"]:
        return "none: the original"
    if not loss["measured"]:
        return "not measured"
    best = min(loss["measured"], key=lambda row: (row["tokens_trained"] > 0, row["kl"]))
    return f"KL {best['kl']:.3f}, {best['row']}"


def _loss_lines(document: Mapping[str, Any]) -> list[str]:
    """Whose figures these are, and what order the rows have."""
    seen = {row["row"]: row for option in document["options"] for row in option["loss"]["measured"]}
    lines = [
        f"{name}: {row['model']} at {row['d_qk']}/{row['d_vo']} of {row['head_dim']}, {row['kv_dtype']} on {row['engine']}, "
        + (f"{row['tokens_trained']:,} tokens trained" if row["tokens_trained"] else "untrained")
        + f": KL {row['kl']:.3f} ± {row['kl_standard_error']:.3f} nats a token to its original, perplexity "
        f"x{row['perplexity_ratio']:.3f} ({row['text']})"
        for name, row in seen.items()
    ]
    if document["calibration"] is not None:
        lines.append(
            "predicted: measured of this model on the text, in closed form, before anything is aligned or trained"
        )
    order = (
        "first the rows whose loss is measured or bounded by that of narrower ones, by loss; then those whose KV dtype "
        "nobody measured"
    )
    return [*lines, order, "decoding: speed over the original's in 16 bits, by bytes read in a step"]


def _refusal_lines(document: Mapping[str, Any]) -> list[str]:
    """What the engine does not take, each rule said once, and what is too large."""
    rules: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for row in document["refused"]:
        rules.setdefault((row["rule"], tuple(row["widths"])), []).append(row["kv_dtype"])
    lines = [
        f"refused: {', '.join(map(str, widths))} in {', '.join(names)}: it takes {rule}"
        for (rule, widths), names in rules.items()
    ]
    return lines + [
        f"too large: {row['kv_dtype']}, {_size(row['bytes'])} at {row['d_qk']}/{row['d_vo']}"
        for row in document["too_large"]
    ]


def _note_lines(document: Mapping[str, Any]) -> list[str]:
    """Notes on KV dtypes, each said once, and which of them were only read about."""
    notes: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in document["options"]:
        if row["note"]:
            names, widths = notes.setdefault(row["note"], ({}, {}))
            names[row["kv_dtype"]] = None
            widths[f"{widths_text(row['d_qk'])}/{widths_text(row['d_vo'])}"] = None
    lines = [f"{', '.join(names)} at {', '.join(widths)}: {note}" for note, (names, widths) in notes.items()]
    read = dict.fromkeys(row["kv_dtype"] for row in document["options"] if not row["ran"])
    return [*lines, *([f"read in the engine's source, not run: {', '.join(read)}"] if read else [])]


def _size(size: float) -> str:
    power = next((power for power in (3, 2) if size >= 2 ** (10 * power)), 1)
    return f"{size / 2 ** (10 * power):.4g} {' KMG'[power]}iB"
