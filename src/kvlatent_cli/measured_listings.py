"""How measurements look to people: an evaluation, a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

Figures = Mapping[str, Any]


def evaluation_listing(document: Figures) -> list[Any]:
    """The figures of both models side by side, tasks, and what is wrong."""
    from kvlatent.evaluation.checks import CHECKS  # imports torch, which `--help` does without

    figures, names = document["figures"], ["latent"]
    if document["original"] is not None:
        names.insert(0, "original")
    listing = Table(box=box.SIMPLE_HEAD)
    listing.add_column("")
    for name in names:
        label = name if name == "original" or "latent" in document["model"] else document["model"]["name"]
        listing.add_column(label, justify="right")
    for check in CHECKS:
        measured = [check.name in figures[name] for name in names]
        if not any(measured):
            continue
        for label, show in check.rows(figures["latent"]).items():
            cells = [
                show(figures[name]) if known else "-" for name, known in zip(names, measured, strict=True)
            ]
            listing.add_row(label, *cells)
    lines = [line for check in CHECKS for line in check.lines(figures)]
    return [listing, *lines, *_diagnosis(document["diagnosis"])]


_UNDECIDED = ("forgetting:", "positional confusion:")


def _diagnosis(diagnosis: Figures) -> list[str]:
    lines = [diagnosis["summary"]]
    lines += [
        f"{found['name']}: {found['advice']}" for found in diagnosis["findings"] if found["name"] != "none"
    ]
    undecided = [sentence for sentence in diagnosis["not_measured"] if sentence.startswith(_UNDECIDED)]
    return [*lines, *(f"not judged: {sentence}" for sentence in undecided)]


def study_listing(document: Figures) -> list[Any]:
    """How far a study is, and the means of its settings over seeds."""
    from kvlatent.jobs.record import with_error  # which imports torch

    lines = [f"{len(document['finished'])} of {len(document['cells'])} cells finished in {document['out']}"]
    for what in ("redone", "failed", "impossible"):
        lines += [f"{what}: {cell}: {why}" for cell, why in document.get(what, {}).items()]
    lines += [f"being measured by another process: {cell}" for cell in document.get("elsewhere", ())]
    damaged = document.get("summary", {}).get("damaged", {})
    lines += [
        f"damaged: {cell}: {why}" for cell, why in damaged.items() if cell not in document.get("redone", {})
    ]
    if "summary" not in document:
        return [*document["cells"], *lines]
    rows = document["summary"]["rows"]
    varying = [
        name for name in _names(rows, "settings") if len({str(r["settings"].get(name)) for r in rows}) > 1
    ]
    shown = [name for name in ("perplexity", "ratio", "cache_ratio") if name in _names(rows, "figures")]
    listing = Table(box=box.SIMPLE_HEAD)
    for name in varying:
        listing.add_column(name)
    for name in [*shown, "seeds"]:
        listing.add_column(name, justify="right")
    for row in rows:
        figures = [row["figures"].get(name) for name in shown]
        cells = ["-" if f is None else with_error(f["mean"], f["standard_error"], 4) for f in figures]
        listing.add_row(
            *(str(row["settings"].get(name, "")) for name in varying), *cells, str(len(row["seeds"]))
        )
    return [listing, *lines]


def _names(rows: list[Figures], part: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[part]))
