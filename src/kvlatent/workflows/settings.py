"""The settings of a run: options and a recipe file brought together; the number of training tokens, device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from kvlatent.jobs.recipe import Recipe
from kvlatent.model.time_estimate import stage_settings

__all__ = ["PlanOptions", "Width", "all_overrides", "default_tokens", "resolve_recipe"]

Width = int | list[int] | tuple[int, ...]

# A default run spends this many floating-point operations, about ten minutes on two laptop cores or on one
# data-centre GPU; within these bounds in tokens.
_DEFAULT_FLOPS = {"cpu": 2e13, "cuda": 1e17}
_DEFAULT_TOKENS = (65_536, 20_000_000)
_KEYS = {
    "seed": "seed",
    "dtype": "dtype",
    "preset": "conversion.preset",
    "table": "conversion.table",
    "align": "conversion.align",
    "blocks": "calibration.blocks",
}


class PlanOptions(TypedDict, total=False):
    """What decides a run, beside model and text; all of it can be left out.

    Keys:
        kv: share of the original cache to keep, in (0, 1]; d_qk, d_vo: widths instead, one number or one per layer.
        engine: that must be able to run the result; per_layer: let layers differ in width (with kv).
        preset, table, align: of the conversion; blocks: of the calibration.
        recipe: YAML file; overrides: `section.key=value` strings on top of it.
        tokens: of all stages together; stages: "none", "1", "2" or "both".
        device: "auto", "cpu" or "cuda"; dtype: "float32" or "bfloat16" (autocast); seed: of everything random.
    """

    kv: float | None
    d_qk: Width | None
    d_vo: Width | None
    engine: str | None
    per_layer: bool
    preset: str | None
    table: str | None
    align: int | None
    blocks: int | None
    recipe: str | Path | None
    overrides: Sequence[str]
    tokens: int | None
    stages: str
    device: str
    dtype: str | None
    seed: int | None


def resolve_recipe(options: PlanOptions, *, size: int, device: str, stages: tuple[int, ...]) -> Recipe:
    """The recipe of a run, with its number of tokens settled.

    Without `tokens`, a recipe that was given keeps its own numbers, else one is chosen that finishes in reasonable
    time. The stages that run share `tokens` in proportion to the recipe's numbers.

    Args:
        options: as for `plan_run`.
        size: parameters of the model's layers, without embeddings and head.
        device: "cpu" or "cuda".
        stages: which stages run.

    Raises:
        ValueError: `tokens` is not positive, or what `Recipe.load` refuses.
    """
    tokens, path = options.get("tokens"), options.get("recipe")
    if tokens is not None and tokens <= 0:
        raise ValueError(
            f"--tokens must be positive: got {tokens}; try 100000, or --stages none to skip training"
        )
    overrides = all_overrides(options)
    recipe = Recipe.load(path, overrides)
    said = path is not None or any(key.startswith(("stage1.tokens=", "stage2.tokens=")) for key in overrides)
    if not stages or (tokens is None and said):
        return recipe
    total = tokens if tokens is not None else default_tokens(size, device)
    whole = sum(stage_settings(recipe, stage).tokens for stage in stages)
    shares = [
        f"stage{s}.tokens={max(1, round(total * stage_settings(recipe, s).tokens / whole))}" for s in stages
    ]
    return Recipe.load(path, [*overrides, *shares])


def all_overrides(options: PlanOptions) -> list[str]:
    """The overrides among the options, and after them the options that stand for a recipe key."""
    given = [(key, options.get(name)) for name, key in _KEYS.items()]
    return [*options.get("overrides", ()), *(f"{key}={value}" for key, value in given if value is not None)]


def default_tokens(size: int, device: str) -> int:
    """Tokens of a run nobody gave a number for, from the model's size (parameters) and the device alone."""
    low, high = _DEFAULT_TOKENS
    return int(min(high, max(low, _DEFAULT_FLOPS[device] / (8 * size))))
