"""Which rotary table a narrow key should have: attenuation curves, perplexity, word order and needle, at several widths.

Keys alone are narrowed, so that nothing but the table and the kept pairs differs; the softmax keeps the original's scale.

- standard: every r-th pair, turned by the model's base formula at the low width.
- frequency-aware: the same pairs, turned by the paper's table.
- own-frequency: the same pairs, each at the frequency it was trained with. Where no scaling changes the base formula and
  the width divides the head's, that is the standard table again, so the two agree.
- matched: the pairs whose own frequencies make up the paper's table.
- calibrated: the pairs that a text asks for, head by head, at their own frequencies, with gains and alignment.

The paper draws the curves and measures no model with either table.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.progress import Progress, Step
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import effective_table, rope_theta_of
from kvlatent.model.rotary import attenuation, standard_exponents
from kvlatent.model.table import RotaryTable
from kvlatent.selection.latent_config import choose
from kvlatent_lab.study.grid_cells import PAPER_PARTS, Cell, Grid, Scale, choices_of, widths_of
from kvlatent_lab.study.measure_cell import measure_model, train_cell
from kvlatent_lab.study.study_cell import numeric
from kvlatent_lab.study.subject import Subject

__all__ = ["ROPE", "measure_curves"]

TABLES: dict[str, dict[str, Any]] = {
    "standard": {"keys": "stride", "frequencies": "own"},
    "frequency-aware": {"keys": "stride", "frequencies": "frequency_aware"},
    "own-frequency": {"keys": "stride", "frequencies": "own"},
    "matched": {"keys": "matched", "frequencies": "own"},
    "calibrated": {},
}
POSITIONS = 4096  # the paper's range for a base of 10,000
DRAWN = 256  # of them are kept for the picture, closer together at short distances
_WINDOW = 65  # positions of the moving average that noise is measured against
_TRIALS = {"needle": 10, "order": 16}
_DEPTHS = (0.1, 0.5, 0.9)


def rotary_cells(scale: Scale) -> list[Cell]:
    """Every table at every width of the keys; values stay whole."""
    cells = []
    for width in widths_of(scale.head_dim, PAPER_PARTS):
        for table, choices in TABLES.items():
            preset = "calibrated" if table == "calibrated" else "own-frequency"
            drawn = preset == "calibrated" or scale.tokens > 0
            for seed in scale.seeds if drawn else scale.seeds[:1]:
                name = f"{table}-{width}-seed{seed}"
                cell = Cell(name, width, scale.head_dim, preset, seed, choices=choices, extra={"rope": table})
                cells.append(replace(cell, **scale.trained()))
    return cells


def measure_rotary(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Convert, train where tokens are given; curves, perplexity, order and needle."""
    latent = None
    if cell.extra["rope"] == "standard":
        config = standard_config(subject.model.config, cell, choices_of(cell, subject.recipe))
        latent = convert(subject.model, config)
    model, on_the_way = train_cell(subject, cell, progress, latent)
    figures = measure_model(subject, model, progress) | on_the_way
    figures |= measure_curves(subject.model.config, latent_config_of(model.config))
    for name, measure in (("order", order_of), ("needle", needle_of)):
        step = progress.step(name)
        original = subject.remembered(
            f"{name}-original", lambda m=measure, s=step: m(subject, subject.model, s)
        )
        own = measure(subject, model, step)
        figures |= compare_maps(name, original, own)
    return figures


def standard_config(config: Any, cell: Cell, choices: Any) -> LatentConfig:
    """A latent config with every r-th pair turned by theta^(-2j/d), d the rotated channels that are kept."""
    latent = choose(config, cell.d_qk, cell.d_vo, choices)
    kept = latent.tables_at(0)[0]
    theta = rope_theta_of(config)
    frequencies = tuple(theta**-e for e in standard_exponents(kept.rotary_dim))
    table = RotaryTable(frequencies, attention_factor=kept.attention_factor)
    return replace(latent, tables=((table,),))


def measure_curves(config: Any, latent: LatentConfig) -> dict[str, Any]:
    """Attenuation with the distance (equation 10, a mean over channels), of the original's table and of the latent's.

    Args:
        config: transformers config of the original.
        latent: its tables, of one head, one layer or the model.

    Returns:
        "attenuation": {"positions", "original", "latent": mean over all tables}, and of the latent's tables, each a mean
        over them: "attenuation_negative_share" of positions below 0, "attenuation_minimum", "attenuation_noise" (standard
        deviation around a moving average), and "attenuation_error", the root mean square distance to the original's curve.
    """
    positions = torch.arange(POSITIONS)
    original = _curve(effective_table(config), positions)
    layers = range(config.num_hidden_layers)
    tables = {table for layer in layers for table in latent.tables_at(layer)}
    weights = [sum(latent.tables_at(layer).count(table) for layer in layers) for table in tables]
    curves = torch.stack([_curve(table, positions) for table in tables])
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def mean(values: Tensor) -> float:
        return float(share @ values.double())

    drawn = sorted({round(math.exp(x)) - 1 for x in np.linspace(0, math.log(POSITIONS), DRAWN)})
    smooth = torch.nn.functional.avg_pool1d(curves[:, None], _WINDOW, stride=1)[:, 0]
    middle = curves[:, _WINDOW // 2 : -(_WINDOW // 2)]
    return {
        "attenuation": {
            "positions": drawn,
            "original": [round(x, 6) for x in original[drawn].tolist()],
            "latent": [round(x, 6) for x in (share @ curves)[drawn].tolist()],
        },
        "attenuation_negative_share": mean((curves < 0).double().mean(1)),
        "attenuation_minimum": mean(curves.amin(1)),
        "attenuation_noise": mean((middle - smooth).std(1)),
        "attenuation_error": mean((curves - original).square().mean(1).sqrt()),
    }


def _curve(table: RotaryTable, positions: Tensor) -> Tensor:
    return attenuation(torch.tensor(table.short, dtype=torch.float64), positions)


def order_of(subject: Subject, model: PreTrainedModel, step: Step) -> dict[str, Any]:
    """Order sensitivity on the reported text."""
    from kvlatent.evaluation.checks.word_order import order

    length = min(256, subject.block_size)
    return order(
        model, _ids(subject), subject.tokenizer, depths=_DEPTHS, length=length, trials=_TRIALS["order"],
        progress=step.to,
    )  # fmt: skip


def needle_of(subject: Subject, model: PreTrainedModel, step: Step) -> dict[str, Any]:
    """Needle in the reported text, at a quarter of the context and at all of it (4,096 tokens at the most)."""
    from kvlatent.evaluation.checks.needle import needle

    limit = min(getattr(model.config, "max_position_embeddings", None) or POSITIONS, POSITIONS)
    contexts = sorted({max(limit // 4, min(limit, 64)), limit})
    trials = _TRIALS["needle"]
    return needle(
        model, subject.tokenizer, haystack=_ids(subject), contexts=contexts, depths=_DEPTHS, trials=trials,
        progress=step.to,
    )  # fmt: skip


def _ids(subject: Subject) -> list[int]:
    return torch.as_tensor(subject.blocks()[:]["input_ids"]).flatten().tolist()


def compare_maps(name: str, original: dict[str, Any], latent: dict[str, Any]) -> dict[str, Any]:
    """The maps of both models, and the mean of the latent's less the original's with its paired standard error."""
    from kvlatent.evaluation.checks.needle import needle_drop
    from kvlatent.evaluation.checks.word_order import order_drop

    if name == "needle":
        kept = ("contexts", "depths", "exact", "rank", "trials", "needle_tokens")
        drop = needle_drop(original, latent)
        means = {part: drop[part] for part in ("exact_mean", "exact_standard_error", "rank_mean")}
    else:
        parts = ("margin", "preferred", "after_margin", "after_preferred")
        kept = ("spans", "depths", "trials", *parts, *(f"{part}_standard_error" for part in parts))
        rows = order_drop(original, latent)["by_span"]
        means = {
            f"{part}_mean": float(np.mean([row[f"{part}_difference"] for row in rows]))
            for part in ("margin", "after_margin")
        }
    maps = {
        side: {part: of[part] for part in kept if numeric(of[part])}
        for side, of in ((name, latent), (f"original_{name}", original))
    }
    return maps | {f"{name}_{part}": value for part, value in means.items() if value is not None}


ROPE = Grid(
    "rope",
    "which rotary table narrow keys should have: equation 10, perplexity, order and needle",
    rotary_cells,
    measure_rotary,
)
