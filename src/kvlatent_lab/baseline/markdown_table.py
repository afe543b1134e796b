"""The markdown of the rows that are finished: all of their figures, old and new side by side, and what they say of fewer bits.

What is compared with the original, or with the row before, is compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from kvlatent_lab.baseline.against_quantised import against_quantised
from kvlatent_lab.baseline.columns import CONTEXTS, TEXTS
from kvlatent_lab.baseline.finished_rows import MAKING, Figures, paired_change, ratio_between
from kvlatent_lab.baseline.question_files import SETS
from kvlatent_lab.baseline.side_by_side import render_side_by_side

__all__ = ["render_markdown"]

_EMPTY = "-"


def render_markdown(found: Mapping[str, Figures], pictures: Mapping[str, str]) -> str:
    """Markdown of the rows, in their order, and a note of what is missing.

    Args:
        found: documents by name; at least one.
        pictures: what is said in their place -> their address, to stand over the table.
    """
    lines = [_cells(name, document, found.get("original")) for name, document in found.items()]
    head = list(lines[0])
    body = [head, ["---"] * len(head), *([line[name] for name in head] for line in lines)]
    parts = [
        f"# Baseline on {next(iter(found.values()))['model']}",
        *(f"![{about}]({address})" for about, address in pictures.items()),
        *against_quantised(found),
        "\n".join(f"| {' | '.join(line)} |" for line in body),
        _note(found),
        render_side_by_side(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(name: str, document: Figures, whole: Figures | None) -> dict[str, str]:
    """A row, by heading."""
    figures, seconds = document["figures"], document["seconds"]
    original = {} if whole is None else whole["figures"]
    cells = {"row": name, "widths": _widths(figures), "cache, bytes a token": _bytes(figures)}
    for text in TEXTS:
        cells[f"perplexity, {text}"] = _perplexity(document, whole, text)
    known = figures.get("text fineweb", {})
    cells["KL to the original, nats"] = _with_error(known.get("kl"), known.get("kl_standard_error"))
    cells["top-1 agreement"] = _number(known.get("top1_agreement"))
    for one in SETS:
        for metric in ("acc",) if one == "lambada" else ("acc", "acc_norm"):
            pair = figures.get(f"task {one}"), original.get(f"task {one}")
            cells[f"{one}, {metric}"] = _accuracy(*pair, metric)
    for kind in ("pass key", "needle"):
        at = [figures.get(f"{kind} {context}") for context in CONTEXTS]
        sizes = "/".join(str(context) for context in CONTEXTS)
        for score in ("exact", "rank"):
            cells[f"{kind}, {score}, at {sizes}"] = "/".join(_grid_mean(one, score) for one in at)
    cells["word order, nats (preferred)"] = _order(figures.get("order"))
    for part in MAKING:
        cells[f"{part}, min"] = _minutes(seconds.get(part))
    measured = [value for key, value in seconds.items() if key not in MAKING]
    cells["evaluation, min"] = _minutes(sum(measured) if measured else None)
    return cells


def _number(value: float | None, digits: int = 3) -> str:
    return _EMPTY if value is None else f"{value:.{digits}f}"


def _with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    return _number(value, digits) + ("" if value is None or error is None else f" ± {error:.{digits}f}")


def _minutes(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds / 60, 1)


def _widths(figures: Figures) -> str:
    """d_qk/d_vo; a mean where layers differ."""
    if "widths" not in figures:
        return _EMPTY
    sides = [figures["widths"][side] for side in ("d_qk", "d_vo")]
    return "/".join(f"{side}" if isinstance(side, int) else f"{fmean(side):.1f} on average" for side in sides)


def _bytes(figures: Figures) -> str:
    found = figures.get("cache")
    return _EMPTY if found is None else f"{found['bytes_per_token']:,.0f}"


def _perplexity(document: Figures, original: Figures | None, text: str) -> str:
    """The perplexity, and how many times the original's it is, with the error of paired blocks."""
    own = document["figures"].get(f"text {text}")
    if own is None:
        return _EMPTY
    shown = _number(own["perplexity"], 2)
    ratio = None if original is None else ratio_between(document, original, text)
    return shown if ratio is None else f"{shown} (x{_with_error(*ratio)})"


def _accuracy(own: Figures | None, original: Figures | None, metric: str) -> str:
    """The share that is right, and the change from the original with the error of paired questions."""
    if own is None or own.get(metric) is None:
        return _EMPTY
    shown = _number(own[metric])
    if original is None:
        return _with_error(own[metric], own.get(f"{metric}_stderr"))
    value, error = paired_change(own["answers"][metric], original["answers"][metric])
    return f"{shown} ({value:+.3f}{'' if error is None else f' ± {error:.3f}'})"


def _grid_mean(found: Figures | None, score: str) -> str:
    return _EMPTY if found is None else _number(fmean(x for row in found[score] for x in row), 2)


def _order(found: Figures | None) -> str:
    if found is None:
        return _EMPTY
    margin, preferred = (fmean(x for row in found[key] for x in row) for key in ("margin", "preferred"))
    return f"{margin:.2f} ({preferred:.2f})"


def _note(found: Mapping[str, Figures]) -> str:
    """What is not there and why, how much was measured, and on what."""
    sentences = []
    for kind, names in (("text", TEXTS), ("task", SETS)):
        absent = [
            name for name in names if not any(f"{kind} {name}" in one["figures"] for one in found.values())
        ]
        if absent:
            sentences.append(f"Not measured, because there was no file of that name: {', '.join(absent)}.")
    failed = {name: one["record"]["failed"] for name, one in found.items() if "failed" in one["record"]}
    sentences += [f"`{name}` has no figures: {why}." for name, why in failed.items()]
    some = next((one for one in found.values() if "text fineweb" in one["figures"]), {})
    if some:
        figures = some["figures"]
        texts = {name: figures[f"text {name}"]["tokens"] for name in TEXTS if f"text {name}" in figures}
        sets = {name: figures[f"task {name}"]["samples"] for name in SETS if f"task {name}" in figures}
        trials = {c: figures[f"needle {c}"]["trials"] for c in CONTEXTS if f"needle {c}" in figures}
        sentences.append(
            f"Tokens: {_listed(texts)}. Questions: {_listed(sets)}. Needles and pass keys a depth: {_listed(trials)}."
        )
    sentences.append(
        "Errors are standard errors: of a ratio to the original over paired blocks, of a change in accuracy (in brackets) over "
        "paired questions. Minutes are those of one process on a machine that others may have used, too."
    )
    machines = {_device(one["record"]["machine"]) for one in found.values()}
    dtypes = {one["record"]["dtype"] for one in found.values()}
    sentences.append(f"Measured in {', '.join(sorted(dtypes))} on {', '.join(sorted(machines))}.")
    return "\n".join(sentences)


def _device(machine: Mapping[str, Any]) -> str:
    """What computed: the card where there was one."""
    return str(machine.get("accelerator") or machine["processor"])


def _listed(numbers: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items()) or _EMPTY
