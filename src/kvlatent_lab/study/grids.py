"""All studies by name."""

from __future__ import annotations

import difflib

from kvlatent_lab.study.conversion_grids import CHOICES, CONVERSION, WIDTHS
from kvlatent_lab.study.eviction import EVICTION
from kvlatent_lab.study.grid_cells import Grid
from kvlatent_lab.study.rotary_grid import ROPE
from kvlatent_lab.study.training_grids import LORA_RANK, OBJECTIVE, STAGES

__all__ = ["STUDIES", "grid_of"]

STUDIES = {
    grid.name: grid for grid in (WIDTHS, LORA_RANK, STAGES, OBJECTIVE, ROPE, EVICTION, CONVERSION, CHOICES)
}


def grid_of(name: str) -> Grid:
    """The study of that name.

    Raises:
        ValueError: there is none; a near match is named.
    """
    if name in STUDIES:
        return STUDIES[name]
    near = difflib.get_close_matches(name.lower(), STUDIES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(STUDIES)}"
    raise ValueError(f"there is no study {name!r}; {hint}")
