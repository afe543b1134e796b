"""Sections of how a checkpoint was made: the losses of both stages, and the widths and errors of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlatent_lab.report.blocks import Block, Section, line_block
from kvlatent_lab.report.charts import Line
from kvlatent_lab.report.html_tables import Cell, Table, cell
from kvlatent_lab.report.measured import measured_models
from kvlatent_lab.report.result_files import Document, Documents

__all__ = ["layers", "thinned", "training"]

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
_SUMMARY = (
    ("steps", "steps"),
    ("tokens", "tokens"),
    ("minutes", "minutes"),
    ("tokens_per_second", "tokens per second"),
    ("first_loss", "first loss"),
    ("last_loss", "last loss"),
)


def training(documents: Documents) -> Section | None:
    """Loss curves of both stages, and what each step of a run brought."""
    blocks = [block for stage in _STAGES if (block := _losses(documents, stage)) is not None]
    runs = [
        document for document in documents.of("run") if document.content.training or document.content.figures
    ]
    blocks += [block for document in runs for block in _run_tables(document, alone=len(runs) == 1)]
    if not blocks:
        return None
    trained = any(block.chart is not None for block in blocks) or any(run.content.training for run in runs)
    lead = (
        ""
        if not trained
        else (
            "Stage I brings every layer's output back to the original's; stage II the whole model. Their losses are not of "
            "one kind and do not compare."
        )
    )
    return Section("training", "Making it", lead, tuple(blocks))


def _losses(documents: Documents, stage: int) -> Block | None:
    lines, sources, left_out = [], [], 0
    for document in documents.of("metrics"):
        steps = [step for step in document.content if step.stage == stage]
        if not steps:
            continue
        chosen = thinned(steps, _MOST_POINTS)
        left_out += len(steps) - len(chosen)
        label = document.path.parent.name
        lines.append(Line(label, [s.tokens for s in chosen], [s.loss for s in chosen], marks=False))
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


def thinned(steps: Sequence[Any], most: int) -> list[Any]:
    """At most so many entries, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _run_tables(document: Document, *, alone: bool) -> list[Block]:
    """What the stages took, and the perplexity after each step."""
    run, where = document.content, "" if alone else f" ({document.name})"
    blocks = []
    if run.training:
        stages = list(run.training)
        rows = [
            (text, [_figure(run.training[stage].get(key)) for stage in stages])
            for key, text in _SUMMARY
            if any(key in run.training[stage] for stage in stages)
        ]
        table = Table.of(
            f"stages-{document.name}", "", [_STAGE_NAMES.get(stage, stage) for stage in stages], rows
        )
        blocks.append(Block(f"What the stages took{where}", (table,), sources=(document,)))
    if run.figures:
        rows = [
            (text, [cell(one.perplexity, one.standard_error), cell(one.ratio, one.ratio_standard_error)])
            for name, text in _STEPS.items()
            if (one := run.figures.get(name)) is not None
        ]
        table = Table.of(f"steps-{document.name}", "", ["perplexity", "over the original's"], rows)
        blocks.append(Block(f"Perplexity after each step{where}", (table,), sources=(document,)))
    return blocks


def _figure(value: Any) -> Cell:
    return cell(value if isinstance(value, (int, float)) and not isinstance(value, bool) else None)


def layers(documents: Documents) -> Section | None:
    """Widths, errors of every strategy, and the distance of every layer from the original's."""
    blocks = []
    for document in documents.of("run"):
        if document.content.conversion is not None and document.content.conversion.layers:
            blocks += _converted_layers(document)
    blocks += [*_widths(documents), *_measured_layers(documents)]
    blocks = [block for block in blocks if block is not None]
    lead = "Layers from the input (0) upwards."
    return Section("layers", "Layer by layer", lead, tuple(blocks)) if blocks else None


def _converted_layers(document: Document) -> list[Block | None]:
    rows = document.content.conversion.layers
    names = list(dict.fromkeys(name for row in rows for name in row.errors))
    lines = []
    for name in ["calibrated", *(name for name in names if name != "calibrated")]:
        known = [(row.layer, error) for row in rows if (error := row.errors.get(name)) is not None]
        role = {"calibrated": "c1", "paper": "c2"}.get(name, "")
        if known:
            lines.append(Line(name, [layer for layer, _ in known], [error for _, error in known], role=role))
    common: dict[str, Any] = {
        "x_label": "layer",
        "sources": [document],
        "x_ticks": _ticks([r.layer for r in rows]),
    }
    at = [row.layer for row in rows]
    widths = [
        Line("keys, d_qk", at, [row.d_qk for row in rows], steps=True),
        Line("values, d_vo", at, [row.d_vo for row in rows], steps=True),
    ]
    return [
        line_block(
            f"layer-errors-{document.name}",
            "What other strategies would have cost",
            lines,
            y_label="relative squared error of the attention output",
            note="Each layer alone, on the original's inputs. A strategy that is impossible at these widths has no point.",
            log_y=True,
            **common,
        ),
        line_block(f"layer-widths-{document.name}", "Widths", widths, y_label="channels per head", **common),
    ]


def _widths(documents: Documents) -> list[Block | None]:
    """Widths of evaluated models whose layers differ."""
    blocks = []
    for one in measured_models(documents):
        if one.config is not None and isinstance(one.config.d_qk, tuple) | isinstance(one.config.d_vo, tuple):
            count = max(len(d) for d in (one.config.d_qk, one.config.d_vo) if isinstance(d, tuple))
            at = list(range(count))
            lines = [
                Line("keys, d_qk", at, [one.config.d_qk_at(layer) for layer in at], steps=True),
                Line("values, d_vo", at, [one.config.d_vo_at(layer) for layer in at], steps=True),
            ]
            title, name = f"Widths of {one.label}", f"widths-{one.label}"
            options: dict[str, Any] = {
                "y_label": "channels per head",
                "sources": [one.source],
                "x_ticks": _ticks(at),
            }
            blocks.append(line_block(name, title, lines, x_label="layer", **options))
    return blocks


def _measured_layers(documents: Documents) -> list[Block | None]:
    """Error, attention divergence and entropy of every layer, a line a model."""
    models = [
        one for one in measured_models(documents) if one.figures.fidelity and one.figures.fidelity.layers
    ]
    blocks = []
    for name, title, y_label, level in (
        (
            "relative_error",
            "Error of the layer's output",
            "relative squared error; 1: no better than the mean",
            None,
        ),
        ("attention_kl", "Divergence of the attention", "nats, from the original's", None),
        (
            "entropy_ratio",
            "Spread of the attention",
            "entropy over the original's; 1: as sharp as before",
            1.0,
        ),
    ):
        lines = []
        for one in models:
            assert one.figures.fidelity is not None
            rows = one.figures.fidelity.layers
            known = [(row.layer, value) for row in rows if (value := getattr(row, name)) is not None]
            if known:
                lines.append(Line(one.label, [layer for layer, _ in known], [value for _, value in known]))
        blocks.append(
            line_block(
                f"layers-{name}",
                title,
                lines,
                x_label="layer",
                y_label=y_label,
                x_ticks=_ticks([x for line in lines for x in line.x]),
                level=level,
                sources=[one.source for one in models],
                note="The whole latent model runs, so a layer's figure holds what those below it did.",
            )
        )
    return blocks


def _ticks(values: Sequence[float]) -> list[float]:
    """Every layer while there is room, else every so many."""
    places = sorted(set(values))
    return places[:: max(1, -(-len(places) // 12))]
