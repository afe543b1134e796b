"""How wide keys and values must be: the paper's Tables 2 and 6, equal and unequal widths, some of them at equal budget.

The paper's 128 channels a head scale with the model's; its preset (with the frequency-aware table) stands beside the
calibrated one. Untrained unless tokens are given: the paper's own table is after training.
"""

from __future__ import annotations

from typing import Any

from kvlatent.jobs.progress import Progress
from kvlatent_lab.study.converted_models import trained
from kvlatent_lab.study.grid_cells import PAPER_PARTS, Cell, Grid, Scale, widths_of
from kvlatent_lab.study.measuring import measured
from kvlatent_lab.study.subject import Subject

__all__ = ["WIDTHS"]

PRESETS = ("paper", "calibrated")


def cells(scale: Scale) -> list[Cell]:
    """Both presets at every pair of widths; a seed changes nothing where nothing is drawn or trained."""
    found = []
    for d_qk, d_vo in pairs(scale.head_dim):
        for preset in PRESETS:
            drawn = preset == "calibrated" or scale.tokens > 0
            for seed in scale.seeds if drawn else scale.seeds[:1]:
                name = f"{preset}-{d_qk}x{d_vo}-seed{seed}"
                found.append(Cell(name, d_qk, d_vo, preset, seed, **scale.trained()))
    return found


def pairs(head_dim: int) -> list[tuple[int, int]]:
    """(d_qk, d_vo) of Table 2, then of Table 6."""
    narrow = widths_of(head_dim, PAPER_PARTS)
    equal = [(width, width) for width in narrow]
    values_whole = [(width, head_dim) for width in narrow]
    keys_whole = [(head_dim, width) for width in narrow]
    unequal = [pair for width in narrow[1:] for pair in ((narrow[0], width), (width, narrow[0]))]
    return [*equal, *values_whole, *keys_whole, *unequal]


def figures(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Convert, train where tokens are given, measure."""
    model, on_the_way = trained(subject, cell, progress)
    return measured(subject, model, progress) | on_the_way


WIDTHS = Grid(
    "widths",
    "which widths of keys and values cost how much (Tables 2 and 6 of the paper)",
    cells,
    figures,
)
