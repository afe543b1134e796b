"""All studies by name, and what a call of one asks for, checked before anything is loaded: model, texts, recipe, cells."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import lcm
from pathlib import Path
from typing import Any

from kvlatent.jobs.devices import choose_device, resolve_precision
from kvlatent.jobs.recipe import Conversion, Recipe
from kvlatent.jobs.record import command_line, name_for_record
from kvlatent.model.families import head_dim_of
from kvlatent.workflows.run_plan import load_original_config
from kvlatent_lab.study.conversion_grids import CHOICES, CONVERSION, WIDTHS
from kvlatent_lab.study.cross_layer_grid import CROSS_LAYER
from kvlatent_lab.study.eviction import EVICTION
from kvlatent_lab.study.grid_cells import Cell, Grid, Scale, find_refusal
from kvlatent_lab.study.nested_grid import NESTED
from kvlatent_lab.study.rotary_grid import ROPE
from kvlatent_lab.study.subject import Source, resolve_source
from kvlatent_lab.study.training_grids import LORA_RANK, OBJECTIVE, STAGES

__all__ = ["STUDIES", "StudyRequest", "resolve_request"]

STUDIES = {
    grid.name: grid
    for grid in (
        WIDTHS,
        LORA_RANK,
        STAGES,
        OBJECTIVE,
        ROPE,
        EVICTION,
        CONVERSION,
        CHOICES,
        NESTED,
        CROSS_LAYER,
    )
}

_OWN = ("align", "qk_norm")  # of the recipe's conversion; the rest is what studies vary


@dataclass(frozen=True)
class StudyRequest:
    """A call that makes sense.

    Args:
        grid, source, recipe, scale: of the study; `recipe` is the one that cells differ from.
        cells: that were asked for; impossible: cells whose widths do not fit the model, with the reason.
        eval_tokens, device: as asked for.
        options: the options as the command line spells them.
    """

    grid: Grid
    source: Source
    recipe: Recipe
    scale: Scale
    cells: list[Cell]
    impossible: dict[str, str]
    eval_tokens: int
    device: str
    options: dict[str, Any]

    def decides(self, tools: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that decides the figures of all cells, beside their own settings."""
        decisive = {
            **self.source.sha256(),
            "tokens": self.scale.tokens,
            "eval_tokens": self.eval_tokens,
            "device": self.device,
            "recipe": self.recipe.model_dump(mode="json", exclude={"seed"}),
        }
        return decisive if tools is None else {**decisive, "tools": tools["versions"]}

    def command(self, cell: Cell) -> str:
        """A command that measures one cell again."""
        return command_line("study", self.grid.name, {**self.options, "cells": cell.name})


def resolve_request(
    name: str,
    model: str | Path | None,
    out: str | Path,
    *,
    data: str | Path | None,
    eval_data: str | Path | None,
    seeds: Sequence[int] | None,
    tokens: int | None,
    eval_tokens: int,
    cells: str | None,
    recipe: str | Path | None,
    overrides: Iterable[str],
    threads: int | None,
    device: str,
    python: str | None,
) -> StudyRequest:
    """Check a call of `study`; the arguments are its own.

    Raises:
        ValueError, FileNotFoundError: one sentence naming what is wrong and what to do.
    """
    grid, overrides = _find_grid(name), list(overrides)
    if python is not None and grid.requires is None:
        users = " and ".join(study for study, one in STUDIES.items() if one.requires is not None)
        raise ValueError(
            f"--python is for the study {users} only: got --python {python} with {name}; leave it out"
        )
    device = choose_device(device)
    source = resolve_source(model, data, eval_data)
    config = load_original_config(source.model)
    base = resolve_precision(_read_recipe(recipe, overrides), config, device)
    scale = _lay_out(grid, config, base, seeds, tokens)
    possible, impossible = [], {}
    for cell in grid.cells(scale):
        if (why := find_refusal(config, cell, base)) is None:
            possible.append(cell)
        else:
            impossible[cell.name] = why
    options = {
        "model": None if model is None else name_for_record(model),
        "data": None if data is None else name_for_record(data),
        "eval-data": None if eval_data is None else name_for_record(eval_data),
        "out": Path(out),
        "seeds": scale.seeds,
        "tokens": scale.tokens,
        "eval-tokens": eval_tokens,
        "recipe": None if recipe is None else Path(recipe),
        "set": overrides,
        "threads": threads,
        "device": device,
        "python": None if python is None else Path(python),
    }
    wanted = _match_cells(grid, possible, cells)
    return StudyRequest(grid, source, base, scale, wanted, impossible, eval_tokens, device, options)


def _find_grid(name: str) -> Grid:
    """The study of that name.

    Raises:
        ValueError: there is none; a near match is named.
    """
    if name in STUDIES:
        return STUDIES[name]
    near = difflib.get_close_matches(name.lower(), STUDIES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(STUDIES)}"
    raise ValueError(f"there is no study {name!r}; {hint}")


def _read_recipe(path: str | Path | None, overrides: list[str]) -> Recipe:
    """The recipe that cells differ from; what a study varies may not be set by hand."""
    base, plain = Recipe.load(path, overrides), Recipe.load(path).conversion
    for key in Conversion.model_fields:
        value = getattr(base.conversion, key)
        if key not in _OWN and value != getattr(plain, key):
            raise ValueError(
                f"a study sets conversion.{key} itself: got conversion.{key}={value}; leave it out "
                f"(conversion.{' and conversion.'.join(_OWN)} can be set)"
            )
    return base


def _lay_out(grid: Grid, config: Any, base: Recipe, seeds: Sequence[int] | None, tokens: int | None) -> Scale:
    """What the grid is laid out for.

    Raises:
        ValueError: no seeds, one twice, a negative number of tokens, or none where the study trains.
    """
    chosen = list(grid.seeds if seeds is None else seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ValueError(f"a study takes different seeds from 0 on: got {chosen}; try 0,1,2")
    wanted = grid.tokens if tokens is None else tokens
    if wanted < 0 or (grid.trains and not wanted):
        least = "positive, as it is about training" if grid.trains else "0 (untrained) or more"
        raise ValueError(f"--tokens of the study {grid.name} must be {least}: got {wanted}; try 100000")
    block = base.data.block_size
    block = min(block, getattr(config, "max_position_embeddings", None) or block)
    steps = [s.batch_size * s.gradient_accumulation * block for s in (base.stage1, base.stage2)]
    share = base.stage1.tokens / (base.stage1.tokens + base.stage2.tokens)
    return Scale(head_dim_of(config), chosen, wanted, share, lcm(*steps), base.calibration.blocks)


def _match_cells(grid: Grid, cells: list[Cell], patterns: str | None) -> list[Cell]:
    """The cells whose names match one of the patterns, in order.

    Raises:
        ValueError: none does.
    """
    wanted = ["*"] if patterns is None else [pattern.strip() for pattern in patterns.split(",")]
    matching = [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in wanted)]
    if not matching:
        named = f", such as {', '.join(cell.name for cell in cells[:3])}" if cells else ""
        raise ValueError(
            f"no cell of the study {grid.name} matches {patterns or '*'}: the model has {len(cells)}{named}; name one "
            "or more of them, with * for any characters"
        )
    return matching
