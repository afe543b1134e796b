"""All studies by name."""

from __future__ import annotations

import difflib

from .cells import Grid
from .eviction import EVICTION
from .lora_rank import LORA_RANK
from .objective import OBJECTIVE
from .rope import ROPE
from .stages import STAGES
from .widths import WIDTHS

__all__ = ["STUDIES", "grid_of"]

STUDIES = {grid.name: grid for grid in (WIDTHS, LORA_RANK, STAGES, OBJECTIVE, ROPE, EVICTION)}


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
