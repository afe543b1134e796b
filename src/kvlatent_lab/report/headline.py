"""The sections on what the models are worth as a whole: the headline and the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from kvlatent_lab.report.blocks import Block, Section, numbers_in
from kvlatent_lab.report.figures import Fidelity
from kvlatent_lab.report.html_tables import Cell, Table, cell, share, words
from kvlatent_lab.report.measured import Measured, measured_models, one_text
from kvlatent_lab.report.result_files import Documents

__all__ = ["diagnoses", "headline"]


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
    ("text", lambda one: words(one.source.record.text and one.source.record.text.name)),
    ("tokens scored", lambda one: cell(one.figures.tokens)),
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
    who = "The original" if all(one.is_original for one in models) else "The original and what was made of it"
    where = (
        f"{who}, on the same text."
        if one_text(models)
        else f"{who}. The texts differ, or how they were read: columns compare only within one file."
    )
    lead = f"{where} ± is one standard error."
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
