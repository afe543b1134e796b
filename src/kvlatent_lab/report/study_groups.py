"""Cells of a study, whatever they hold, as data frames: settings that vary, figures over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kvlatent_lab.report.result_files import Document
from kvlatent_lab.study.study_cell import StudySettings, flat

__all__ = [
    "FIRST",
    "SEED",
    "SHARE",
    "SPLIT",
    "TOKENS",
    "Groups",
    "cell_frames",
    "frontier",
    "grouped",
    "telling",
]

SEED = "seed"
SHARE = "cache kept, %"
SPLIT = "keys' part of the cache, %"
FIRST = "part of the tokens in stage I, %"
TOKENS = "tokens trained on"
"""Settings that follow from others, added to those of a cell where they can be told; none of them makes a group."""

_GRIDS = {"needle": "exact", "order": "margin"}
"""Measurements that are grids, and which of their grids stands for them, by its mean."""


@dataclass(frozen=True)
class Groups:
    """Cells with equal settings but for the seed: a row each in every frame, and the names of the settings that vary.

    `errors` are standard errors over seeds; of one seed those of the measurement, where there are some.
    """

    varying: list[str]
    settings: pd.DataFrame
    means: pd.DataFrame
    errors: pd.DataFrame
    seeds: pd.Series
    first: pd.Series  # the cell, by its number


def cell_frames(cells: Sequence[Document]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Settings and figures (numbers; a grid by its mean) of every cell, a row each."""
    figures = [_numbers(one.content.figures.model_dump(exclude_none=True)) for one in cells]
    rows = [
        {**own.model_dump(exclude_unset=True), **_derived(own, numbers)}
        for own, numbers in zip((one.content.settings for one in cells), figures, strict=True)
    ]
    frame = pd.DataFrame(rows, dtype=object)
    return frame.where(frame.notna(), None), pd.DataFrame(figures, dtype=float)


def grouped(cells: Sequence[Document]) -> Groups:
    """Means and standard errors over the seeds of every setting, in the order of the settings."""
    settings, figures = cell_frames(cells)
    derived = (SEED, SHARE, SPLIT, FIRST, TOKENS)
    varying = [name for name in settings if name not in derived and len({*map(repr, settings[name])}) > 1]
    at = settings[varying].map(_place).apply(tuple, axis=1) if varying else pd.Series([()] * len(cells))
    group = at.map({place: number for number, place in enumerate(sorted(set(at)))})
    over_seeds = figures.groupby(group)
    means, errors = over_seeds.mean(), over_seeds.sem()
    for name in list(means):
        if (own := _error_of(name, means)) is not None:
            errors[name] = errors[name].fillna(means[own])
    own_errors = [name for name in means if name.endswith(("standard_error", "_stderr"))]
    return Groups(
        varying,
        settings[~group.duplicated()].set_axis(group.drop_duplicates(), axis=0).sort_index(),
        means.drop(columns=own_errors),
        errors.drop(columns=own_errors),
        group.value_counts().sort_index(),
        pd.Series(group.index, group).groupby(level=0).first(),
    )


def telling(groups: Groups) -> list[str]:
    """Those of the settings that tell the groups apart; the others follow from them."""
    kept = list(groups.varying)
    for name in reversed(groups.varying):
        fewer = [one for one in kept if one != name]
        if fewer and not groups.settings[fewer].map(repr).duplicated().any():
            kept = fewer
    return kept


def frontier(values: pd.Series, *, rising: bool = False) -> pd.Series:
    """Values in the order of their places, without those where a lower place is as good already.

    Less is better, more where they are `rising`.
    """
    ordered = values.sort_index()
    costs = -ordered if rising else ordered
    return ordered[costs < costs.cummin().shift(fill_value=np.inf)]


def _place(value: Any) -> tuple[bool, float, str]:
    """Numbers by their size, before words; True is a word."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not number, float(value) if number else 0.0, "" if number else repr(value))


def _derived(settings: StudySettings, figures: dict[str, float]) -> dict[str, float]:
    """What the settings and figures say without saying it."""
    derived = {TOKENS: float(settings.tokens)}
    if "cache_ratio" in figures:
        derived[SHARE] = round(100 * figures["cache_ratio"], 6)
    if settings.d_qk and settings.d_vo:
        derived[SPLIT] = round(100 * settings.d_qk / (settings.d_qk + settings.d_vo), 6)
    if settings.tokens > 0:
        derived[FIRST] = round(100 * settings.stage1_tokens / settings.tokens, 6)
    return derived


def _error_of(name: str, known: pd.DataFrame) -> str | None:
    """The figure that is the standard error of another: of perplexity, standard_error; of x_mean, x_standard_error."""
    path, _, last = name.rpartition(".")
    prefix = f"{path}." if path else ""
    names = [f"{last}_standard_error", f"{last}_stderr", f"{last.removesuffix('_mean')}_standard_error"]
    names += ["standard_error"] if last == "perplexity" else []
    return next((f"{prefix}{one}" for one in names if f"{prefix}{one}" in known), None)


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Numbers among the figures; a grid (needle, order) by its mean."""
    numbers: dict[str, float] = {}
    for name, value in flat(figures).items():
        path, _, last = name.rpartition(".")
        grid = _GRIDS.get(path.rpartition(".")[2].removeprefix("original_"))
        if isinstance(value, int | float) and grid is None:
            numbers[name] = float(value)
        elif isinstance(value, list) and grid == last:
            numbers[f"{path}, mean {last}"] = float(np.mean(value))
    return numbers
