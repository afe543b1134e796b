"""Sections of how a checkpoint was made: the losses of both stages, and the widths and errors of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvlatent_lab.report.blocks import Block, Section, line_block, section
from kvlatent_lab.report.charts import Line, points
from kvlatent_lab.report.measured_models import measured_models
from kvlatent_lab.report.page_listings import Listing, entry
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["layers", "training"]

_MOST_POINTS = 100
_STAGES = {1: ("Stage I", "in-layer error"), 2: ("Stage II", "loss, nats per token")}
_STAGE_NAMES = {"stage1": "stage I", "stage2": "stage II"}
_STEPS = {
    "original": "original",
    "converted": "converted",
    "stage1": "after stage I",
    "stage2": "after stage II",
    "latent": "as saved",
}
_SUMMARY = {
    "steps": "steps",
    "tokens": "tokens",
    "minutes": "minutes",
    "tokens_per_second": "tokens per second",
    "first_loss": "first loss",
    "last_loss": "last loss",
}
_LAYER_SCORES = {
    "relative_error": ("Error of the layer's output", "relative squared error; 1: no better than the mean"),
    "attention_kl": ("Divergence of the attention", "nats, from the original's"),
    "entropy_ratio": ("Spread of the attention", "entropy over the original's; 1: as sharp as before"),
}


def training(documents: Documents) -> Section | None:
    """Loss curves of both stages, and what each step of a run brought."""
    blocks = [_losses(documents, stage) for stage in _STAGES]
    runs = [one for one in documents.of("run") if one.content.training or one.content.figures]
    trained = any(blocks) or any(run.content.training for run in runs)
    blocks += [
        block for run in runs for block in _run_listings(run, "" if len(runs) == 1 else f" ({run.name})")
    ]
    lead = (
        "Stage I brings every layer's output back to the original's; stage II the whole model. Their losses are not of "
        "one kind and do not compare."
    )
    return section("training", "Making it", lead if trained else "", blocks)


def _losses(documents: Documents, stage: int) -> Block | None:
    lines, sources, left_out = [], [], 0
    for document in documents.of("metrics"):
        steps = [step for step in document.content if step.stage == stage]
        if not steps:
            continue
        at = np.linspace(0, len(steps) - 1, min(len(steps), _MOST_POINTS)).round().astype(int)
        left_out += len(steps) - len(at)
        drawn = points([steps[i].tokens for i in at], [steps[i].loss for i in at])
        lines.append(Line(document.path.parent.name, drawn, marks=False))
        beside = [run for run in documents.of("run") if run.path.parent == document.path.parent]
        sources += [document, *beside]
    title, y_label = _STAGES[stage]
    return line_block(
        f"loss-stage{stage}",
        title,
        lines,
        x_label="tokens trained on",
        y_label=y_label,
        log_y=True,
        note=f"Every so many steps: {left_out} of them are left out, evenly." if left_out else "",
        sources=sources,
    )


def _run_listings(document: Document, where: str) -> list[Block]:
    """What the stages took, and the perplexity after each step."""
    run, blocks = document.content, []
    if run.training:
        rows = [
            (text, [entry(getattr(stage, key)) for stage in run.training.values()])
            for key, text in _SUMMARY.items()
            if any(getattr(stage, key) is not None for stage in run.training.values())
        ]
        names = [_STAGE_NAMES.get(stage, stage) for stage in run.training]
        listing = Listing.of(f"stages-{document.name}", "", names, rows)
        blocks.append(Block(f"What the stages took{where}", (listing,), sources=(document,)))
    if run.figures:
        rows = [
            (text, [entry(one.perplexity, one.standard_error), entry(one.ratio, one.ratio_standard_error)])
            for name, text in _STEPS.items()
            if (one := run.figures.get(name)) is not None
        ]
        listing = Listing.of(f"steps-{document.name}", "", ["perplexity", "over the original's"], rows)
        blocks.append(Block(f"Perplexity after each step{where}", (listing,), sources=(document,)))
    return blocks


def layers(documents: Documents) -> Section | None:
    """Widths, errors of every strategy, and the distance of every layer from the original's."""
    blocks: list[Block | None] = []
    for run in documents.of("run"):
        if run.content.conversion is not None and (rows := run.content.conversion.layers):
            blocks.append(_strategies(run, rows))
            at, widths = [row.layer for row in rows], [[row.d_qk for row in rows], [row.d_vo for row in rows]]
            blocks.append(_widths(f"layer-widths-{run.name}", "Widths", at, widths, run))
    for one in measured_models(documents):
        if one.config is not None and isinstance(one.config.d_qk, tuple) | isinstance(one.config.d_vo, tuple):
            at = list(range(max(len(d) for d in (one.config.d_qk, one.config.d_vo) if isinstance(d, tuple))))
            widths = [[of(layer) for layer in at] for of in (one.config.d_qk_at, one.config.d_vo_at)]
            blocks.append(_widths(f"widths-{one.label}", f"Widths of {one.label}", at, widths, one.source))
    blocks += [_measured(documents, score) for score in _LAYER_SCORES]
    return section("layers", "Layer by layer", "Layers from the input (0) upwards.", blocks)


def _widths(name: str, title: str, at: list[int], widths: list[list[int]], source: Document) -> Block | None:
    names = ("keys, d_qk", "values, d_vo")
    lines = [Line(each, points(at, width), steps=True) for each, width in zip(names, widths, strict=True)]
    return _by_layer(name, title, lines, y_label="channels per head", sources=[source])


def _strategies(document: Document, rows: Sequence[Any]) -> Block | None:
    """The error of every layer under every strategy, the one that was taken first."""
    names = dict.fromkeys(["calibrated", *(name for row in rows for name in row.errors)])
    lines = []
    for name in names:
        role = {"calibrated": "c1", "paper": "c2"}.get(name, "")
        drawn = points([row.layer for row in rows], [row.errors.get(name) for row in rows])
        lines.append(Line(name, drawn, role))
    return _by_layer(
        f"layer-errors-{document.name}",
        "What other strategies would have cost",
        lines,
        y_label="relative squared error of the attention output",
        note="Each layer alone, on the original's inputs. A strategy that is impossible at these widths has no point.",
        log_y=True,
        sources=[document],
    )


def _measured(documents: Documents, score: str) -> Block | None:
    """A score of every layer, a line a model."""
    lines, sources = [], []
    for one in measured_models(documents):
        if one.fidelity is not None:
            rows = one.fidelity.layers
            lines.append(Line(one.label, points([r.layer for r in rows], [getattr(r, score) for r in rows])))
            sources.append(one.source)
    title, y_label = _LAYER_SCORES[score]
    return _by_layer(
        f"layers-{score}",
        title,
        lines,
        y_label=y_label,
        level=1.0 if score == "entropy_ratio" else None,
        sources=sources,
        note="The whole latent model runs, so a layer's figure holds what those below it did.",
    )


def _by_layer(name: str, title: str, lines: Sequence[Line], **options: Any) -> Block | None:
    return line_block(name, title, lines, x_label="layer", at_points=True, **options)
