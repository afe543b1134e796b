"""How measurements look to people: an evaluation, a study."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from .listings import plus_minus

Figures = Mapping[str, Any]


def evaluation_listing(document: Figures) -> list[Any]:
    """The figures of both models side by side, tasks, and what is wrong."""
    figures, names = document["figures"], ["latent"]
    if document["original"] is not None:
        names.insert(0, "original")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        label = name if name == "original" or "latent" in document["model"] else document["model"]["name"]
        table.add_column(label, justify="right")
    for label, show in _ROWS.items():
        cells = [show(figures[name]) for name in names]
        if any(cells):
            table.add_row(label, *(cell or "-" for cell in cells))
    for task, metric in _metrics(figures["latent"]):
        cells = [_task_figure(figures[name], task, metric) for name in names]
        table.add_row(f"{task}, {metric}", *cells)
    return [table, *_beside(figures), *_diagnosis(document["diagnosis"])]


def _grid_mean(figures: Figures, name: str, score: str, unit: str = "") -> str:
    if name not in figures:
        return ""
    return f"{fmean(value for row in figures[name][score] for value in row):.3f}{unit}"


_ROWS = {
    "perplexity": lambda f: plus_minus(f["perplexity"], f["standard_error"]) if "perplexity" in f else "",
    "bits per byte": lambda f: f"{f['bits_per_byte']:.4f}" if "bits_per_byte" in f else "",
    "cache bytes/token": lambda f: (
        f"{f['cache_bytes_per_token']:,.0f}" if "cache_bytes_per_token" in f else ""
    ),
    "needle, exact": lambda f: _grid_mean(f, "needle", "exact"),
    "needle, reciprocal rank": lambda f: _grid_mean(f, "needle", "rank"),
    "true order likelier by": lambda f: _grid_mean(f, "order", "margin", " nats"),
    "true order preferred": lambda f: _grid_mean(f, "order", "preferred"),
    "past logits moved by the future": lambda f: f"{f['causality']:.3g}" if "causality" in f else "",
}
_UNDECIDED = ("forgetting:", "positional confusion:")


def _metrics(figures: Figures) -> list[tuple[str, str]]:
    """(task, metric) of what lm-eval measured."""
    tasks = figures.get("tasks", {}).get("tasks", {})
    return [
        (task, metric)
        for task, found in tasks.items()
        for metric in found
        if isinstance(found[metric], float) and f"{metric}_stderr" in found
    ]


def _task_figure(figures: Figures, task: str, metric: str) -> str:
    found = figures["tasks"]["tasks"][task]
    return plus_minus(found[metric], found.get(f"{metric}_stderr"))


def _beside(figures: Figures) -> list[str]:
    """What compares both models."""
    lines = []
    if "ratio" in figures:
        ratio = plus_minus(figures["ratio"], figures["ratio_standard_error"])
        lines.append(f"perplexity over the original's: {ratio}; cache: {figures['cache_ratio']:.1%}")
    if "fidelity" in figures:
        found = figures["fidelity"]
        kl = plus_minus(found["kl"], found["kl_standard_error"], 4)
        lines.append(
            f"KL from the original: {kl} nats a token; same likeliest token: {found['top1_agreement']:.1%}"
        )
    return lines


def _diagnosis(diagnosis: Figures) -> list[str]:
    lines = [diagnosis["summary"]]
    lines += [
        f"{found['name']}: {found['advice']}" for found in diagnosis["findings"] if found["name"] != "none"
    ]
    undecided = [sentence for sentence in diagnosis["not_measured"] if sentence.startswith(_UNDECIDED)]
    return [*lines, *(f"not judged: {sentence}" for sentence in undecided)]


def study_listing(document: Figures) -> list[Any]:
    """How far a study is, and the means of its settings over seeds."""
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
    table = Table(box=box.SIMPLE_HEAD)
    for name in varying:
        table.add_column(name)
    for name in [*shown, "seeds"]:
        table.add_column(name, justify="right")
    for row in rows:
        figures = [row["figures"].get(name) for name in shown]
        cells = ["-" if f is None else plus_minus(f["mean"], f["standard_error"], 4) for f in figures]
        table.add_row(
            *(str(row["settings"].get(name, "")) for name in varying), *cells, str(len(row["seeds"]))
        )
    return [table, *lines]


def _names(rows: list[Figures], part: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[part]))
