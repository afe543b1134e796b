"""How much of a score the latent model has kept: of needle and order, above chance, with a standard error.

Both models answered the same questions, so the error is of the differences: question by question where the figures
say, cell by cell of the grid where not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

__all__ = ["LEAST", "SCORES", "kept_scores"]

SCORES = {
    "needle": {"rank": 0.0, "exact": 0.0},
    "order": {"after_margin": 0.0, "margin": 0.0, "preferred": 0.5},
}
"""What chance gives in every score. `after_margin` is the part of the margin that only attention can know."""

LEAST = 0.1
"""Score of the original above chance below which none can be seen to fall."""

_ALIKE = ("contexts", "spans", "depths", "trials", "seed")


def kept_scores(name: str, original: Any, latent: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Share of every score of the grid `name` that the latent model kept, and why there are others that say nothing.

    Returns:
        By "NAME_SCORE_kept": `value` (latent over original, above chance), `standard_error` (None for one question),
        `original` and `latent` (the means); and sentences.
    """
    if not original or not latent:
        return {}, [f"{name}: needs figures of both models"]
    for setting in _ALIKE:
        if original.get(setting) != latent.get(setting):
            pair = f"{original.get(setting)} and {latent.get(setting)}"
            return {}, [f"{name}: the two models were measured with different {setting}, {pair}"]
    evidence, silent = {}, []
    for score, chance in SCORES[name].items():
        if score not in original or score not in latent:
            continue
        before, after = (fmean(cell for row in one[score] for cell in row) for one in (original, latent))
        top = before - chance
        if top < LEAST:
            silent.append(
                f"{name}: the original's {score} is {top:.2g} above chance, below {LEAST} none can fall"
            )
            continue
        drops = [a - b for a, b in zip(_units(original, score), _units(latent, score), strict=True)]
        error = stdev(drops) / math.sqrt(len(drops)) / top if len(drops) > 1 else None
        evidence[f"{name}_{score}_kept"] = {
            "value": (after - chance) / top,
            "standard_error": error,
            "original": before,
            "latent": after,
        }
    return evidence, silent


def _units(document: Mapping[str, Any], score: str) -> list[float]:
    """One score a trial if the document has them, else one a cell."""
    trials = document.get(f"trial_{score}")
    if not trials:
        return [cell for row in document[score] for cell in row]
    rows = trials if isinstance(trials[0], Sequence) else [trials]
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [fmean(column) for column in columns if column]
