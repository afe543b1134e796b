"""What a study consists of: cells, each one conversion and training that is measured by itself, and the grid of them.

A cell is data. What decides its figures is in its settings, which its result file repeats; the file is named after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlatent.jobs.recipe import Recipe
from kvlatent.model.families import head_dim_of
from kvlatent.selection.choices import BY_PAIRS, Choices, resolve_choices
from kvlatent.selection.latent_config import check_widths, choose

__all__ = [
    "MEASURED",
    "PAPER_PARTS",
    "Cell",
    "Grid",
    "Scale",
    "choices_of",
    "find_refusal",
    "recipe_of",
    "widths_of",
]

MEASURED = "measured"
PAPER_PARTS = (2, 4, 8)
"""The paper's 64, 32 and 16 of 128 channels are a half, a quarter and an eighth of a head."""


@dataclass(frozen=True)
class Cell:
    """One conversion, perhaps trained, and its measurement.

    Args:
        name: of the result file.
        d_qk, d_vo: widths.
        per_layer: every layer gets widths of its own, by the statistics, at the share of the cache that d_qk and d_vo take.
        preset: of the conversion; `choices` replaces single answers of it.
        seed: of the calibration blocks, of alignment and of training.
        stage1, stage2: tokens to train on; 0 leaves a stage out.
        recipe: `section.key` of the recipe -> value, for this cell alone.
        extra: settings that only this study knows; "keys" is a rule of `other_selections` there, and with "widths"
            `MEASURED` those of every layer go by what it costs end to end instead of by the statistics.
    """

    name: str
    d_qk: int
    d_vo: int
    preset: str = "calibrated"
    seed: int = 0
    stage1: int = 0
    stage2: int = 0
    choices: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    per_layer: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it in one flat mapping, as the result file has it."""
        return {
            "preset": self.preset,
            "d_qk": self.d_qk,
            "d_vo": self.d_vo,
            "seed": self.seed,
            "stage1_tokens": self.stage1,
            "stage2_tokens": self.stage2,
            **({"per_layer": True} if self.per_layer else {}),
            **self.choices,
            **{key.replace(".", "_"): value for key, value in self.recipe.items()},
            **self.extra,
        }


@dataclass(frozen=True)
class Scale:
    """What a grid is laid out for.

    Args:
        head_dim: channels of a head of the original.
        seeds: one cell each, where a seed changes anything.
        tokens: of training, all stages of a cell together.
        stage1_share: of them, in (0, 1), by the recipe.
        step: tokens of an optimiser step, of either stage; training is rounded up to whole ones.
        blocks: of calibration, by the recipe.
    """

    head_dim: int
    seeds: Sequence[int]
    tokens: int
    stage1_share: float
    step: int
    blocks: int = 128

    def trained(self) -> dict[str, Any]:
        """The tokens of both stages of a cell; of none where nothing is trained."""
        first = round(self.tokens * self.stage1_share)
        return {"stage1": first, "stage2": self.tokens - first}


@dataclass(frozen=True)
class Grid:
    """One study.

    Args:
        name: as the command line calls it; about: what it answers, in one line.
        cells: all cells for a scale, the most important first.
        figures: measures one cell: (subject, cell, progress) -> numbers.
        seeds: by default; tokens: by default; trains: whether it makes no sense without training.
        conclude: what only all cells together say, from their documents, for the summary.
        requires: checks for tools that kvlatent does without, given the interpreter that has them (or None), and returns
            {"python", "versions"}.
        check: raises `ValueError` where no cell can be measured on the subject's text.
    """

    name: str
    about: str
    cells: Callable[[Scale], list[Cell]]
    figures: Callable[..., dict[str, Any]]
    seeds: tuple[int, ...] = (0,)
    tokens: int = 0
    trains: bool = False
    conclude: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    requires: Callable[[str | None], dict[str, Any]] | None = None
    check: Callable[..., Any] | None = None


def choices_of(cell: Cell, base: Recipe) -> Choices:
    """The choices of a cell's conversion; the steps of alignment are the recipe's, where the preset aligns."""
    replaced: dict[str, Any] = dict(cell.choices)
    if cell.preset == "calibrated":
        replaced.setdefault("align", base.conversion.align)
    return resolve_choices(cell.preset, **replaced)


def recipe_of(cell: Cell, base: Recipe) -> Recipe:
    """The recipe of a cell: `base` with the cell's seed, tokens and own keys."""
    values = base.model_dump()
    values["seed"] = cell.seed
    own = {"stage1.tokens": cell.stage1, "stage2.tokens": cell.stage2}
    for key, value in {**{name: tokens for name, tokens in own.items() if tokens}, **cell.recipe}.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def widths_of(head_dim: int, parts: Sequence[int]) -> list[int]:
    """A head's channels over each of `parts`; those that do not come out whole are left out."""
    return [head_dim // part for part in parts if head_dim % part == 0]


def find_refusal(config: Any, cell: Cell, base: Recipe) -> str | None:
    """Why a model with that transformers config cannot be converted to a cell's widths, or None."""
    choices = choices_of(cell, base)
    try:
        if choices.keys in BY_PAIRS or cell.d_qk == head_dim_of(config):
            check_widths(config, cell.d_qk, cell.d_vo)
        else:
            choose(config, cell.d_qk, cell.d_vo, choices)
    except ValueError as error:
        return str(error)
    return None
