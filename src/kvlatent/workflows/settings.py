"""The settings of a run: options and a recipe file brought together; the number of training tokens, device and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from kvlatent.jobs.devices import resolve_precision
from kvlatent.jobs.recipe import Recipe, option_keys
from kvlatent.model.time_estimate import stage_settings

__all__ = [
    "RUN_OPTIONS",
    "Width",
    "check_options",
    "check_target",
    "check_trackers",
    "recipe_overrides",
    "resolve_recipe",
]

Width = int | list[int] | tuple[int, ...]

RUN_OPTIONS = (
    "kv",
    "d_qk",
    "d_vo",
    "engine",
    "per_layer",
    "explain",
    "recipe",
    "overrides",
    "tokens",
    "minutes",
    "stages",
    "device",
    *option_keys(),
)
"""What decides a run, beside model and text; all of it can be left out, and None is as if it were.

    kv: share of the original cache to keep, in (0, 1]; d_qk, d_vo: widths instead, one number or one per layer.
    engine: that must be able to run the result; per_layer: let layers differ in width (with kv).
    explain: compare strategies layer by layer, too.
    recipe: YAML file, or a `Recipe`; overrides: `section.key=value` strings on top of it.
    tokens: of all stages together; stages: "none", "1", "2" or "both".
    minutes: of the whole run, which decides steps and tokens itself, whatever the recipe file says of them.
    device: "auto", "cpu" or "cuda".
    preset, table, align, global_steps, blocks, dtype, seed: keys of the recipe that are marked as options (`recipe.OPTION`).
"""

# A default run spends this many floating-point operations, about ten minutes on two laptop cores or on one
# data-centre GPU; within these bounds in tokens.
_DEFAULT_FLOPS = {"cpu": 2e13, "cuda": 1e17}
_SAME_SHARE = 0.03  # widths are whole channels, so a share is met as closely as heads allow
_DEFAULT_TOKENS = (65_536, 20_000_000)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `TypeError`, as Python does for a keyword, where an option is none of `RUN_OPTIONS`."""
    for name in options:
        if name not in RUN_OPTIONS:
            near = get_close_matches(name, RUN_OPTIONS, n=1) or RUN_OPTIONS
            raise TypeError(f"unexpected option {name!r} of a run; did you mean {', '.join(near)}?")


def resolve_recipe(
    options: Mapping[str, Any], *, config: Any, size: int, device: str, stages: tuple[int, ...]
) -> Recipe:
    """The recipe of a run, with its number of training tokens.

    With `minutes` the numbers stay open. Without `tokens`, a recipe that was given keeps its own numbers, else one is chosen that finishes in reasonable
    time. The stages that run share `tokens` in proportion to the recipe's numbers.

    Args:
        options: see `RUN_OPTIONS`.
        config: of the model, whose width `auto` of the dtype goes by.
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
    overrides = recipe_overrides(options)
    recipe = resolve_precision(Recipe.load(path, overrides), config, device)
    check_trackers(recipe)
    if options.get("minutes") is not None:  # which decides them once the speed is known
        return Recipe.load(recipe, ["conversion.align=null", "conversion.global_steps=null"])
    said = path is not None or any(key.startswith(("stage1.tokens=", "stage2.tokens=")) for key in overrides)
    if not stages or (tokens is None and said):
        return recipe
    total = tokens if tokens is not None else _default_tokens(size, device)
    whole = sum(stage_settings(recipe, stage).tokens for stage in stages)
    shares = [
        f"stage{s}.tokens={max(1, round(total * stage_settings(recipe, s).tokens / whole))}" for s in stages
    ]
    return Recipe.load(recipe, shares)


def check_target(recipe: Recipe, config: Any, share: float) -> None:
    """Raise `ValueError` where a recipe was sized for another model, or for another share of the cache.

    Args:
        config: of the original or of a latent model.
        share: of the cache that is kept.
    """
    latent = getattr(config, "kv_latent", None)
    found = {
        "family": latent["original_model_type"] if latent else config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "kv": round(share, 3),
    }
    for name, wanted in recipe.target.model_dump().items():
        same = wanted is None or (
            abs(wanted - share) < _SAME_SHARE if name == "kv" else wanted == found[name]
        )
        if not same:
            raise ValueError(
                f"the recipe is for {name}={wanted}: got {found[name]}; take the recipe of this model and width, or pass "
                f"--set target.{name}=null to use it nevertheless"
            )


def check_trackers(recipe: Recipe) -> None:
    """Raise `ValueError` where `report_to` names a tracker that there is not, or that is not installed."""
    if not recipe.report_to:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in recipe.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to names a tracker that transformers does not know: got {name!r}; choose among "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if find_spec(name) is None:
            raise ValueError(
                f"report_to {name} needs that package, which is not installed; pip install {name}"
            )


def recipe_overrides(options: Mapping[str, Any]) -> list[str]:
    """The overrides among the options, and after them the options that stand for a recipe key."""
    given = [(key, options.get(name)) for name, key in option_keys().items()]
    return [
        *(options.get("overrides") or ()),
        *(f"{key}={value}" for key, value in given if value is not None),
    ]


def _default_tokens(size: int, device: str) -> int:
    """Tokens of a run nobody gave a number for, from the model's size (parameters) and the device alone."""
    low, high = _DEFAULT_TOKENS
    return int(min(high, max(low, _DEFAULT_FLOPS[device] / (8 * size))))
