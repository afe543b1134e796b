"""Evidence of a failure: a figure beside its threshold, and how much of a score the latent model has kept.

Both models answered the same questions, so the error of a kept score is of the differences: question by question where
the figures say, cell by cell of the grid where not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

__all__ = [
    "FORGETTING_NATS",
    "LEAST",
    "SCORE_KEPT",
    "Figures",
    "Sign",
    "figure",
    "figure_of",
    "score_sign",
    "surely_above",
]

Figures = Mapping[str, Any]

FORGETTING_NATS = 0.2
"""Nats a token, of KL and of log perplexity ratio (on text that the original could have written, the two are one
number). By the scaling law of Hoffmann et al. 2022 (406.4 / N^0.34), 0.21 nats is what 1 B parameters have over a
quarter of them: a model that forgot this much is worth less than a smaller one."""

SCORE_KEPT = 0.8
"""Share of the original's score above chance, in needle and order; the fall must also exceed two standard errors.
Conversions of the embedded model that hold perplexity (ratios to 1.15) kept 0.96 and more."""

LEAST = 0.1
"""Score of the original above chance below which none can be seen to fall."""

_ERRORS = 2.0  # standard errors by which a figure must pass its threshold
_ALIKE = ("contexts", "spans", "depths", "trials", "seed")


class Sign(NamedTuple):
    """What the figures of one check say of one failure.

    Args:
        evidence: by figure `value`, `threshold` and what else is known; empty where it was not measured.
        advice: what to do about it; None where the figures show no sign of the failure.
    """

    evidence: dict[str, dict[str, Any]]
    advice: str | None = None


def figure(value: float | None, threshold: float, error: float | None = None) -> dict[str, Any]:
    """A piece of evidence."""
    return {"value": value, "threshold": threshold, "standard_error": error}


def figure_of(figures: Figures, side: str, name: str) -> Any:
    """A figure of the "latent" or of the "original" model; None where it was not measured."""
    return (figures.get(side) or {}).get(name)


def surely_above(evidence: Figures) -> bool | None:
    """Whether a figure is above its threshold by two standard errors; None for one that is above and has no error."""
    error = evidence["standard_error"]
    if error is None:
        return None if evidence["value"] > evidence["threshold"] else False
    return evidence["value"] - _ERRORS * error > evidence["threshold"]


def score_sign(name: str, chances: Mapping[str, float], advice: str) -> Callable[[Figures, list[str]], Sign]:
    """What the scores of the grid `name` say: `advice` if one of them has fallen below `SCORE_KEPT`.

    Args:
        chances: what chance gives in every score.
    """

    def judge(figures: Figures, missing: list[str]) -> Sign:
        pair = (figure_of(figures, side, name) for side in ("original", "latent"))
        evidence, silent = _kept_scores(name, chances, *pair)
        missing += silent
        return Sign(evidence, advice if any(map(_surely_fallen, evidence.values())) else None)

    return judge


def _surely_fallen(evidence: Figures) -> bool:
    most = evidence["value"] + _ERRORS * (evidence["standard_error"] or 0.0)
    return evidence["value"] < evidence["threshold"] and most < 1.0


def _kept_scores(
    name: str, chances: Mapping[str, float], original: Any, latent: Any
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Share of every score that the latent model kept, and why there are others that say nothing.

    Returns:
        By "NAME_SCORE_kept": `value` (latent over original, above chance), `threshold`, `standard_error` (None for one
        question), `original` and `latent` (the means); and sentences.
    """
    if not original or not latent:
        return {}, [f"{name}: needs figures of both models"]
    for setting in _ALIKE:
        if original.get(setting) != latent.get(setting):
            pair = f"{original.get(setting)} and {latent.get(setting)}"
            return {}, [f"{name}: the two models were measured with different {setting}, {pair}"]
    evidence, silent = {}, []
    for score, chance in chances.items():
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
        kept = figure((after - chance) / top, SCORE_KEPT, error)
        evidence[f"{name}_{score}_kept"] = kept | {"original": before, "latent": after}
    return evidence, silent


def _units(document: Figures, score: str) -> list[float]:
    """One score a trial if the document has them, else one a cell."""
    trials = document.get(f"trial_{score}")
    if not trials:
        return [cell for row in document[score] for cell in row]
    rows = trials if isinstance(trials[0], Sequence) else [trials]
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [fmean(column) for column in columns if column]
