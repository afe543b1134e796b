"""One checkpoint for several widths: what a width that is cut out of it loses to one that was trained alone.

Both are converted, calibrated and trained on the same tokens in all, stage II alone; the nested checkpoint shares them
between its widths, so at two widths it costs half of what two checkpoints do. Untrained, the cut says what the order of
the channels alone is worth.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

from kvlatent.jobs.progress import Progress
from kvlatent.model.channel_slices import slice_model, widths_within
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of, head_dim_of
from kvlatent_lab.spread import standard_error
from kvlatent_lab.study.grid_cells import Cell, Grid, Scale
from kvlatent_lab.study.measure_cell import measure_cell, measure_model, train_cell
from kvlatent_lab.study.subject import Subject

__all__ = ["NESTED"]

SHARES = (0.5, 0.28125)
"""Of the cache; the second is what 18 of 64 channels keep."""


def nested_cells(scale: Scale) -> list[Cell]:
    """Every width alone, and cut out of the checkpoint that was trained at all of them."""
    return [
        Cell(
            f"{trained}-{width}x{width}-seed{seed}",
            width,
            width,
            seed=seed,
            stage2=scale.tokens,
            extra={"trained": trained},
        )
        for seed in scale.seeds
        for width in _widths(scale.head_dim)
        for trained in ("alone", "nested")
    ]


def _widths(head_dim: int) -> list[int]:
    """Of keys and of values, the widest first."""
    return [max(2, 2 * round(share * head_dim / 2)) for share in SHARES]


def measure_nested(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Figures of a width: trained alone, or cut; the training of a nested checkpoint is done once for all of its cells."""
    if cell.extra["trained"] == "alone":
        return measure_cell(subject, replace(cell, extra={}), progress)
    head_dim = head_dim_of(subject.model.config)
    widest, *_ = widths = _widths(head_dim)
    recipe = {"stage2.nested_kv": [width / head_dim for width in widths]}
    whole = replace(cell, name=f"nested-seed{cell.seed}", d_qk=widest, d_vo=widest, recipe=recipe, extra={})
    model, on_the_way = train_cell(subject, whole, progress)
    latent, layers = latent_config_of(model.config), len(attention_layers_of(model.config))
    cut = slice_model(model, widths_within(latent, layers, cell.d_qk, cell.d_vo))
    return measure_model(subject, cut, progress) | on_the_way


def compare_nested(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """{"comparisons": [{"d_qk", "d_vo", "seeds", "log_ratio": mean of ln(perplexity cut / alone), "standard_error" over
    seeds}]}."""
    losses: dict[tuple, dict[str, float]] = defaultdict(dict)
    for document in documents:
        settings = document["settings"]
        place = (settings["d_qk"], settings["d_vo"], settings["seed"])
        losses[place][settings["trained"]] = document["figures"]["loss"]
    found: dict[tuple, list[float]] = defaultdict(list)
    for (d_qk, d_vo, _), pair in losses.items():
        if len(pair) == 2:
            found[d_qk, d_vo].append(pair["nested"] - pair["alone"])
    return {
        "comparisons": [
            {"d_qk": d_qk, "d_vo": d_vo, "seeds": len(each), "log_ratio": statistics.fmean(each)}
            | {"standard_error": standard_error(each)}
            for (d_qk, d_vo), each in found.items()
        ]
    }


NESTED = Grid(
    "nested",
    "what a width cut out of one checkpoint trained at several loses to the width trained alone, at equal tokens",
    nested_cells,
    measure_nested,
    tokens=200_000,
    trains=True,
    conclude=compare_nested,
)
