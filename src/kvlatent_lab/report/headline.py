"""The sections on what the models are worth as a whole: the headline and the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvlatent_lab.report.blocks import Block, Section, section
from kvlatent_lab.report.measured_models import Measured, measured_models, one_text
from kvlatent_lab.report.page_listings import Entry, Listing, entry, share, words
from kvlatent_lab.report.result_files import Documents

__all__ = ["diagnoses", "headline"]


def _widths(one: Measured) -> Entry:
    """Widths of keys and values, a range where layers differ."""
    if one.config is None:
        return Entry()
    pairs = [width if isinstance(width, tuple) else (width,) for width in (one.config.d_qk, one.config.d_vo)]
    return words("/".join(str(min(p)) if min(p) == max(p) else f"{min(p)}\u2013{max(p)}" for p in pairs))


def _mean(one: Measured, measurement: str, score: str) -> float | None:
    """Mean of a grid of the needle or of the word order."""
    measured = getattr(one.figures, measurement)
    return None if measured is None else float(np.mean(getattr(measured, score)))


_ROWS: dict[str, Callable[[Measured], Entry]] = {
    "perplexity": lambda one: entry(one.figures.perplexity, one.figures.standard_error),
    "perplexity over the original's": lambda one: entry(one.over_original, one.ratio_standard_error),
    "bits per byte": lambda one: entry(one.figures.bits_per_byte),
    "text": lambda one: words(one.source.record.text and one.source.record.text.name),
    "tokens scored": lambda one: entry(one.figures.tokens),
    "widths of keys/values": _widths,
    "cache, bytes per token": lambda one: entry(one.figures.cache_bytes_per_token),
    "cache kept": lambda one: share(one.kept),
    "divergence from the original, nats per token": lambda one: (
        entry(one.fidelity.kl, one.fidelity.kl_standard_error) if one.fidelity else Entry()
    ),
    "same likeliest token as the original": lambda one: share(
        one.fidelity.top1_agreement if one.fidelity else None
    ),
    "needle reproduced, mean of the grid": lambda one: share(_mean(one, "needle", "exact")),
    "needle's reciprocal rank, mean": lambda one: entry(_mean(one, "needle", "rank")),
    "true word order likelier by, nats": lambda one: entry(_mean(one, "order", "margin")),
    "change of past logits by the future": lambda one: entry(one.figures.causality),
}
_TILES = {
    "cache kept": "of the cache",
    "perplexity over the original's": "times the original's perplexity",
    "same likeliest token as the original": "of tokens predicted alike",
    "needle reproduced, mean of the grid": "of needles found",
}


def headline(documents: Documents) -> Section | None:
    """One listing: the original and every latent model, all that was measured of them."""
    models = measured_models(documents)
    if not models:
        return None
    rows = [(label, [show(one) for one in models]) for label, show in _ROWS.items()]
    tasks = [one.figures.tasks.tasks for one in models]
    ran = [(task, metrics) for each in tasks for task, metrics in each.items()]
    for name, metric in dict.fromkeys(
        (name, key) for name, row in ran for key in row if f"{key}_stderr" in row
    ):
        rows.append((f"{name}, {metric}", [_task(each.get(name, {}), metric) for each in tasks]))
    names = [
        one.diagnosis and ", ".join(finding.name for finding in one.diagnosis.findings) for one in models
    ]
    rows.append(("diagnosis", [words(each or None) for each in names]))
    rows = [(label, entries) for label, entries in rows if any(one.text != Entry().text for one in entries)]
    listing = Listing.of("headline", "", [one.label for one in models], rows)
    sources = list({one.source.name: one.source for one in models}.values())
    who = "The original" if all(one.is_original for one in models) else "The original and what was made of it"
    differ = ". The texts differ, or how they were read: columns compare only within one file."
    lead = f"{who}{', on the same text.' if one_text(models) else differ} ± is one standard error."
    block = Block("", (listing,), sources=sources, wide=True)
    return Section("headline", "At a glance", lead, [block], _tiles(models))


def _tiles(models: Sequence[Measured]) -> list[tuple[Entry, str]]:
    """The few figures that matter most, where there is one latent model to say them of."""
    latent = [one for one in models if not one.is_original]
    known = [(_ROWS[name](latent[0]), label) for name, label in _TILES.items() if len(latent) == 1]
    return [(one, label) for one, label in known if one.value is not None]


def _task(metrics: dict[str, Any], metric: str) -> Entry:
    """A metric of a task, a share in per cent."""
    value, error = metrics.get(metric), metrics.get(f"{metric}_stderr")
    if not isinstance(value, (float, int)):
        return Entry()
    known = error if isinstance(error, (float, int)) else None
    return share(value, known) if 0 <= value <= 1 else entry(value, known)


def diagnoses(documents: Documents) -> Section | None:
    """What is wrong with each latent model: the numbers, their thresholds, what to change."""
    blocks = []
    for one in measured_models(documents):
        if (diagnosis := one.diagnosis) is None:
            continue
        rows = [
            (
                f"{finding.name}: {name.replace('_', ' ')}",
                [entry(e.value, e.standard_error), entry(e.threshold)],
            )
            for finding in diagnosis.findings
            for name, e in finding.evidence.items()
        ]
        listing = Listing.of(f"diagnosis-{one.label}", "finding", ["value", "threshold"], rows)
        points = [f"{f.name}: {f.advice}" for f in diagnosis.findings if f.advice and f.name != "none"]
        points += [f"Not measured. {sentence}" for sentence in diagnosis.not_measured]
        listings = (listing,) if rows else ()
        blocks.append(Block(one.label, listings, None, diagnosis.summary, tuple(points), (one.source,)))
    lead = "Which of the failures that have a signature of their own are there, and what to change."
    return section("diagnosis", "Diagnosis", lead, blocks)
