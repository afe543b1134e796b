"""Fewer layers that cache against narrower heads, at equal bytes and equal training FLOPs; then both on top of each other.

Half the bytes: pairs of layers share one cache of full width (`shared_cache`), or every layer has half the width. A quarter:
shared and half as wide, or a quarter of the width. Sharing looks at the weights alone, and so does `narrow`, with the same
rules; `calibrated` is the conversion that users have. All are then pulled back by the same divergence from the original.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from kvlatent.jobs.progress import Progress
from kvlatent_lab.shared_cache import SHARED, share_cache
from kvlatent_lab.spread import standard_error
from kvlatent_lab.study.grid_cells import Cell, Grid, Scale, recipe_of
from kvlatent_lab.study.measure_cell import convert_cell, measure_model, train_cell
from kvlatent_lab.study.subject import Subject

__all__ = ["CROSS_LAYER", "forward_flops"]

_WEIGHTS_ALONE = {"preset": "own-frequency", "choices": {"keys": "weights", "table": "head"}}


def cross_layer_cells(scale: Scale) -> list[Cell]:
    """Half the bytes first, then a quarter; a seed draws the training text, and what is calibrated."""
    whole, half, quarter = scale.head_dim, scale.head_dim // 2, scale.head_dim // 4
    designs: list[tuple[str, int, dict[str, Any]]] = []
    for shared, width in ((whole, half), (half, quarter)):
        designs += [(f"shared-{kind}", shared, _WEIGHTS_ALONE) for kind in SHARED]
        designs += [("narrow", width, _WEIGHTS_ALONE), ("calibrated", width, {})]
    return [
        Cell(
            f"{design}-{width}x{width}-seed{seed}",
            width,
            width,
            seed=seed,
            stage2=scale.tokens,
            extra={"design": design},
            **how,
        )
        for seed in scale.seeds
        for design, width, how in designs
    ]


def measure_shared(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Figures of one design after as many tokens as the FLOPs allow that the original's shape takes for the cell's.

    Beside the usual ones "converted_ratio", "forward_flops" a token and "training_flops" of all steps.
    """
    design = cell.extra["design"]
    if design.startswith("shared-"):
        latent = share_cache(subject.model, design.removeprefix("shared-"), cell.d_qk, cell.d_vo)
    else:
        latent = convert_cell(subject, replace(cell, extra={}), progress)
    flops, whole = (forward_flops(model, subject.block_size) for model in (latent, subject.model))
    settings = recipe_of(cell, subject.recipe).stage2
    step = settings.batch_size * settings.gradient_accumulation * subject.block_size
    a_token = 3 * flops + whole  # forward, twice that backward, and the original's forward
    tokens = step * math.ceil(cell.stage2 * 4 * whole / a_token / step)
    model, on_the_way = train_cell(subject, replace(cell, stage2=tokens), progress, latent)
    trained = {"forward_flops": flops, "training_flops": a_token * on_the_way["tokens_trained"]}
    return measure_model(subject, model, progress) | on_the_way | trained


@torch.no_grad()
def forward_flops(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations a token of a forward pass over that many, attention counted without its mask."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # the one whose products are counted
        model(torch.zeros(1, length, dtype=torch.long, device=model.device), use_cache=False)
    return counter.get_total_flops() / length


def compare_designs(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """{"comparisons": [{"design", "cache_ratio", "seeds", "log_ratio": mean of ln(perplexity / that of "narrow" heads of the
    same bytes and seed), "standard_error" over seeds}]}, without "narrow" itself."""
    narrow, others = {}, defaultdict(list)
    for document in documents:
        settings, figures = document["settings"], document["figures"]
        place = (round(figures["cache_ratio"], 6), settings["seed"])
        if settings["design"] == "narrow":
            narrow[place] = figures["loss"]
        else:
            others[settings["design"], place[0]].append((place, figures["loss"]))
    rows = []
    for (design, ratio), group in others.items():
        differences = [loss - narrow[place] for place, loss in group if place in narrow]
        if differences:
            rows.append(
                {"design": design, "cache_ratio": ratio, "seeds": len(differences)}
                | {"log_ratio": statistics.fmean(differences), "standard_error": standard_error(differences)}
            )
    return {"comparisons": rows}


CROSS_LAYER = Grid(
    "cross-layer",
    "layers that share one cache against narrower heads, at equal bytes and equal training FLOPs, and both together",
    cross_layer_cells,
    measure_shared,
    tokens=150_000,
    trains=True,
    conclude=compare_designs,
)
