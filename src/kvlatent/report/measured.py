"""Models that were measured, and the sections on what they are worth as a whole: the headline and the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..config import LatentConfig
from .blocks import Block, Section, numbers_in
from .documents import Document, Documents
from .figures import Fidelity, Figures
from .tables import Cell, Table, cell, share, words

__all__ = ["Measured", "diagnoses", "headline", "measured_models"]


@dataclass(frozen=True)
class Measured:
    """A model with its figures, those of its original, and the document that says so."""

    label: str
    figures: Figures
    original: Figures | None
    source: Document
    is_original: bool = False

    @property
    def config(self) -> LatentConfig | None:
        """Widths and tables of a latent model, where its document has them."""
        return (
            None if self.is_original or self.source.kind != "evaluation" else self.source.content.model.config
        )


def measured_models(documents: Documents) -> list[Measured]:
    """Models of the evaluations, an original before what came from it; without evaluations those of the runs.

    An original that was measured twice with the same result stands there once.
    """
    found: list[Measured] = []
    for document in documents.of("evaluation"):
        content = document.content
        named = [(content.model.name or document.name, content.figures.get("latent"), False)]
        known = content.original.name if content.original else None
        known = known or (None if "latent" in content.figures else content.model.name)
        named.insert(0, (known or "original", content.figures.get("original"), True))
        _add(found, document, named, content.figures.get("original"))
    if not found:
        steps = {"converted": "converted", "stage1": "after stage I", "latent": "latent"}
        for document in documents.of("run"):
            figures = document.content.figures
            named = [("original", figures.get("original"), True)]
            named += [(text, figures.get(name), False) for name, text in steps.items()]
            _add(found, document, named, figures.get("original"))
    return _labelled(found)


def _add(
    found: list[Measured],
    document: Document,
    named: Sequence[tuple[str, Figures | None, bool]],
    original: Figures | None,
) -> None:
    for label, figures, is_original in named:
        known = is_original and any(one.is_original and one.figures == figures for one in found)
        if figures is not None and not known:
            found.append(Measured(label, figures, original, document, is_original))


def _labelled(found: list[Measured]) -> list[Measured]:
    """Models with labels of their own: those that share one also say where they are from."""
    labels = [one.label for one in found]
    return [
        one
        if labels.count(one.label) == 1
        else Measured(
            f"{one.label} ({one.source.name})", one.figures, one.original, one.source, one.is_original
        )
        for one in found
    ]


def _ratio(one: Measured) -> Cell:
    figures, original = one.figures, one.original
    if (
        figures.ratio is None
        and not one.is_original
        and original
        and original.perplexity
        and figures.perplexity
    ):
        return cell(figures.perplexity / original.perplexity)
    return cell(figures.ratio, figures.ratio_standard_error)


def _kept(one: Measured) -> Cell:
    own = one.figures.cache_bytes_per_token
    whole = None if one.original is None or one.is_original else one.original.cache_bytes_per_token
    return share(own / whole if own and whole else None)


def _widths(one: Measured) -> Cell:
    """Widths of keys and values, a range where layers differ."""
    config = one.config
    if config is None:
        return Cell("–")
    pairs = [one if isinstance(one, tuple) else (one,) for one in (config.d_qk, config.d_vo)]
    return words("/".join(str(min(p)) if min(p) == max(p) else f"{min(p)}\u2013{max(p)}" for p in pairs))


def _fidelity(one: Measured) -> Fidelity:
    return one.figures.fidelity or Fidelity()


def _grid(one: Measured, measurement: str, name: str) -> float | None:
    """Mean of a grid of the needle or of the word order."""
    found = getattr(one.figures, measurement)
    numbers = [] if found is None else numbers_in(getattr(found, name))
    return fmean(numbers) if numbers else None


_ROWS: tuple[tuple[str, Callable[[Measured], Cell]], ...] = (
    ("perplexity", lambda one: cell(one.figures.perplexity, one.figures.standard_error)),
    ("perplexity over the original's", _ratio),
    ("bits per byte", lambda one: cell(one.figures.bits_per_byte)),
    ("widths of keys/values", _widths),
    ("cache, bytes per token", lambda one: cell(one.figures.cache_bytes_per_token)),
    ("cache kept", _kept),
    (
        "divergence from the original, nats per token",
        lambda one: cell(_fidelity(one).kl, _fidelity(one).kl_standard_error),
    ),
    ("same likeliest token as the original", lambda one: share(_fidelity(one).top1_agreement)),
    ("needle reproduced, mean of the grid", lambda one: share(_grid(one, "needle", "exact"))),
    ("needle's reciprocal rank, mean", lambda one: cell(_grid(one, "needle", "rank"))),
    ("true word order likelier by, nats", lambda one: cell(_grid(one, "order", "margin"))),
    ("change of past logits by the future", lambda one: cell(one.figures.causality)),
)


def headline(documents: Documents) -> Section | None:
    """One table: the original and every latent model, all that was measured of them."""
    models = measured_models(documents)
    if not models:
        return None
    rows = [(label, [make(one) for one in models]) for label, make in _ROWS]
    tasks = [(name, row) for one in models for name, row in one.figures.tasks.items()]
    for name, metric in dict.fromkeys(
        (name, key) for name, row in tasks for key in row if f"{key}_stderr" in row
    ):
        rows.append((f"{name}, {metric}", [_task(one.figures.tasks.get(name, {}), metric) for one in models]))
    rows.append(("diagnosis", [_diagnosis(one) for one in models]))
    rows = [(label, cells) for label, cells in rows if any(one.text != "–" for one in cells)]
    table = Table.of("headline", "", [one.label for one in models], rows)
    sources = tuple(dict.fromkeys(one.source.name for one in models))
    chosen = tuple(document for document in documents.found if document.name in sources)
    lead = "The original and what was made of it, on the same text. ± is one standard error."
    return Section(
        "headline", "At a glance", lead, (Block("", (table,), sources=chosen, wide=True),), _tiles(models)
    )


def _tiles(models: Sequence[Measured]) -> tuple[tuple[Cell, str], ...]:
    """The few figures that matter most, where there is one latent model to say them of."""
    latent = [one for one in models if not one.is_original]
    if len(latent) != 1:
        return ()
    rows = dict(_ROWS)
    wanted = (
        ("cache kept", "of the cache"),
        ("perplexity over the original's", "times the original's perplexity"),
        ("same likeliest token as the original", "of tokens predicted alike"),
        ("needle reproduced, mean of the grid", "of needles found"),
    )
    known = [(rows[name](latent[0]), label) for name, label in wanted]
    return tuple((one, label) for one, label in known if one.text != "–")


def _task(task: dict[str, Any], metric: str) -> Cell:
    """A metric of a task, a share in per cent."""
    value, error = task.get(metric), task.get(f"{metric}_stderr")
    if not isinstance(value, (float, int)):
        return Cell("–")
    known = error if isinstance(error, (float, int)) else None
    return share(value, known) if 0 <= value <= 1 else cell(value, known)


def _diagnosis(one: Measured) -> Cell:
    diagnosis = getattr(one.source.content, "diagnosis", None)
    known = diagnosis is not None and diagnosis.findings and not one.is_original
    return words(", ".join(finding.name for finding in diagnosis.findings) if known else None)


def diagnoses(documents: Documents) -> Section | None:
    """What is wrong with each latent model: the numbers, their thresholds, what to change."""
    blocks = []
    for one in measured_models(documents):
        diagnosis = getattr(one.source.content, "diagnosis", None)
        if one.is_original or diagnosis is None:
            continue
        rows = [
            (
                f"{finding.name}: {name.replace('_', ' ')}",
                [cell(e.value, e.standard_error), cell(e.threshold)],
            )
            for finding in diagnosis.findings
            for name, e in finding.evidence.items()
        ]
        table = Table.of(f"diagnosis-{one.label}", "finding", ["value", "threshold"], rows)
        points = [f"{f.name}: {f.advice}" for f in diagnosis.findings if f.advice and f.name != "none"]
        points += [f"Not measured. {sentence}" for sentence in diagnosis.not_measured]
        tables = (table,) if rows else ()
        blocks.append(
            Block(one.label, tables, note=diagnosis.summary, points=tuple(points), sources=(one.source,))
        )
    lead = "Which of the failures that have a signature of their own are there, and what to change."
    return Section("diagnosis", "Diagnosis", lead, tuple(blocks)) if blocks else None
