"""What a run will do, before it does it: choices, widths, bytes per token, tokens per stage, and an estimate of the time.

Numbers of tokens follow from the model's size and the device alone, never from a clock, so that a second call
plans the same run; the clock only serves the printed estimate. Where a share of the cache is asked for and text will be
looked at, the split between keys and values stays open until the statistics are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kvlatent.checkpoints.load import load_config
from kvlatent.engines.facts import check_engine, engine_named
from kvlatent.jobs.devices import choose_device, working_dtype
from kvlatent.jobs.recipe import Conversion, Recipe
from kvlatent.model.cache_bytes import layer_cache_bytes
from kvlatent.model.families import attention_layers_of, family_of_original, head_dim_of, key_value_heads_of
from kvlatent.model.time_estimate import estimate_seconds, layer_size, stage_settings
from kvlatent.model.widths import Widths
from kvlatent.planning.candidates import candidates_for, equal_widths
from kvlatent.planning.shares import check_latent
from kvlatent.selection.choices import (
    BLIND,
    BY_PAIRS,
    NO_DATA,
    UNMEASURED,
    Choices,
    resolve_choices,
    without_statistics,
)
from kvlatent.workflows.minutes import ALIGNMENTS, check_minutes
from kvlatent.workflows.settings import Width, check_options, check_target, resolve_recipe

__all__ = ["STAGES", "Plan", "choices_from_recipe", "load_original_config", "plan_run"]

STAGES: dict[str, tuple[int, ...]] = {"none": (), "1": (1,), "2": (2,), "both": (1, 2)}


@dataclass(frozen=True)
class Plan:
    """A run as it would happen.

    Args:
        choices: of the conversion.
        kv: share of the cache to keep; it decides only where `widths` is None.
        widths: checked, or None where the statistics will decide the split.
        engine: that must be able to run the result, or None.
        per_layer: layers may differ in width where the split is open.
        head_dim, num_layers, num_key_value_heads: of the model.
        recipe: resolved, with its tokens.
        stages: which stages run.
        device: "cpu" or "cuda".
        stored_dtype: of the original's weights, and so of the result's.
        seconds: rough estimate of the training time.
        notes: what the user should know before it starts.
        explain: compare strategies layer by layer, too.
        minutes: of the whole run, where they have still to be split into steps and tokens; else None.
    """

    choices: Choices
    kv: float
    widths: Widths | None
    head_dim: int
    num_layers: int
    num_key_value_heads: int
    recipe: Recipe
    stages: tuple[int, ...]
    device: str
    stored_dtype: torch.dtype
    seconds: float
    engine: str | None = None
    per_layer: bool = False
    notes: tuple[str, ...] = ()
    explain: bool = False
    minutes: float | None = None

    @property
    def calibrates(self) -> bool:
        """Whether statistics of a text are needed."""
        return self.choices.needs_statistics

    def summary(self) -> dict[str, Any]:
        """JSON-able: widths (None while open), choices, bytes per token before and after, tokens per stage, seconds.

        With "minutes", which are still to be split, instead of the tokens.
        """
        measured_in = working_dtype(self.recipe.dtype, self.device, self.stored_dtype)
        sizes = (self.num_layers, self.num_key_value_heads, getattr(torch, measured_in).itemsize)
        original = int(sum(layer_cache_bytes(self.head_dim, self.head_dim, *sizes)))
        reduced = int(self.kv * original)
        settled = self.stages if self.minutes is None else ()
        if self.widths is not None:
            reduced = int(sum(layer_cache_bytes(*self.widths, *sizes)))
        return {
            **({"d_qk": None, "d_vo": None} if self.widths is None else self.widths.to_dict()),
            "head_dim": self.head_dim,
            "preset": self.recipe.conversion.preset,
            "choices": asdict(self.choices),
            "engine": self.engine,
            "calibration_blocks": self.recipe.calibration.blocks if self.calibrates else 0,
            "cache_bytes_per_token": {"original": original, "latent": reduced, "dtype": measured_in},
            "share": reduced / original,
            "tokens": {f"stage{stage}": stage_settings(self.recipe, stage).tokens for stage in settled},
            **({} if self.minutes is None else {"minutes": self.minutes}),
            "device": self.device,
            "dtype": self.recipe.dtype,
            "estimated_seconds": float(f"{self.seconds:.2g}"),
            "notes": list(self.notes),
        }


def plan_run(model: str | Path, *, has_text: bool = True, is_measured: bool = True, **options: Any) -> Plan:
    """What `compress` would do with these arguments; reads the model's config, not its weights.

    Args:
        model: directory, hub id or GGUF file of the original.
        has_text: there is text, or statistics of a text, to calibrate on; otherwise choices that need them give way.
        is_measured: there is text to measure the result on.
        options: see `RUN_OPTIONS`.

    Raises:
        ValueError: an argument, a recipe key or a width that cannot be.
        TypeError: an unknown option.
    """
    check_options(options)
    check_minutes(options)
    stages, minutes = _stages_from_options(options), options.get("minutes")
    device = choose_device(options.get("device") or "auto")
    config = load_original_config(model)
    size, head = layer_size(config)
    recipe = resolve_recipe(options, config=config, size=size, device=device, stages=stages)
    _check_nested(recipe, stages, options)
    engine = options.get("engine")
    choices = choices_from_recipe(recipe.conversion, engine, per_layer=_layers_may_differ(options))
    asked = _widths_from_options(config, choices, has_text, options)
    full = asked == (head_dim_of(config), head_dim_of(config))
    notes = () if full else _notes(choices, has_text, is_measured)
    if not has_text or full:
        choices = without_statistics(choices)
    why = "no text" if not has_text else "the full width" if full else f"preset {recipe.conversion.preset}"
    if minutes is not None:
        choices = _choices_in_minutes(choices, stages, why)
    if options.get("explain") and not choices.needs_statistics:
        raise ValueError(
            "--explain judges strategies by the statistics of a text, and this conversion looks at none "
            f"(got {why}); leave it out, or give a text and the preset calibrated"
        )
    kv = options.get("kv")
    check_target(recipe, config, _share(asked, kv, head_dim_of(config)))
    given = options.get("d_qk") is not None or options.get("d_vo") is not None
    widths = check_latent(config, asked, choices, recipe.conversion, engine, kv=kv, given=given)
    return Plan(
        choices=choices,
        kv=0.5 if kv is None else kv,
        widths=widths,
        head_dim=head_dim_of(config),
        num_layers=len(attention_layers_of(config)),
        num_key_value_heads=key_value_heads_of(config),
        recipe=recipe,
        stages=stages,
        device=device,
        stored_dtype=config.dtype,
        seconds=estimate_seconds(recipe, stages, size, head, config.num_hidden_layers, device)
        if minutes is None
        else 60.0 * minutes,
        engine=engine,
        per_layer=bool(options.get("per_layer")),
        notes=notes,
        explain=bool(options.get("explain")),
        minutes=minutes,
    )


def _notes(choices: Choices, has_text: bool, is_measured: bool) -> tuple[str, ...]:
    """What is to be known of narrow widths that no text was looked at for, or none is measured on."""
    blind = () if has_text else (NO_DATA if choices.needs_statistics else BLIND,)
    return blind if is_measured else (*blind, UNMEASURED)


def _check_nested(recipe: Recipe, stages: tuple[int, ...], options: Mapping[str, Any]) -> None:
    """Raise `ValueError` where stage II would train several widths of a run that cannot have them, before it starts."""
    shares, kv = recipe.stage2.nested_kv, options.get("kv")
    if shares is None or 2 not in stages:
        return
    if (minutes := options.get("minutes")) is not None:
        raise ValueError(
            f"--minutes tries rates of stage II on one width: got --minutes {minutes:g} with stage2.nested_kv={shares}; "
            "give --tokens instead, or train the result with kvlatent train"
        )
    if (
        options.get("d_qk") is None
        and options.get("d_vo") is None
        and max(shares) > (0.5 if kv is None else kv)
    ):
        raise ValueError(
            f"stage II cannot train a wider model than is made: got stage2.nested_kv={shares} and --kv "
            f"{0.5 if kv is None else kv:g}; raise --kv to {max(shares):g}, or leave that share out"
        )


def _share(asked: tuple[Width, Width] | None, kv: float | None, head_dim: int) -> float:
    """Of the cache that is kept: as asked for, or by the widths."""
    if asked is None or kv is not None:
        return 0.5 if kv is None else kv
    means = [width if isinstance(width, int) else sum(width) / len(width) for width in asked]
    return sum(means) / (2 * head_dim)


def _stages_from_options(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Which stages run; a budget in minutes goes to the second, whose goal the conversion's last step shares."""
    asked, minutes = options.get("stages"), options.get("minutes")
    stages = STAGES.get(asked or ("both" if minutes is None else "2"))
    if stages is None:
        raise ValueError(f"--stages is one of {', '.join(STAGES)}: got {asked!r}")
    if minutes is not None and 1 in stages:
        raise ValueError(
            f"--minutes leaves stage 1 out, as all its time is better spent on the next token: got --stages {asked}; leave "
            "it out, or give 2 or none"
        )
    return stages


def _choices_in_minutes(choices: Choices, stages: tuple[int, ...], why: str) -> Choices:
    """The choices with alignment still open, where a conversion looks at a text; `why` it would not.

    Raises:
        ValueError: nothing learns, neither the conversion nor a stage.
    """
    if choices.needs_statistics:
        return replace(choices, align=ALIGNMENTS[-1])  # at the most; so that the text asks for recall
    if not stages:
        raise ValueError(
            f"--minutes is split between steps that learn from a text, and this conversion looks at none (got {why}); "
            "leave it out, or give a text and the preset calibrated"
        )
    return choices


def load_original_config(model: str | Path) -> Any:
    """The transformers config of an original.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is not supported, or latent already.
    """
    config = load_config(str(model))
    family_of_original(config)
    return config


def choices_from_recipe(wanted: Conversion, engine: str | None, *, per_layer: bool = False) -> Choices:
    """The recipe's choices; a table that nobody named is the engine's own, for one width or for one per layer."""
    settings = wanted.model_dump(exclude={"qk_norm"})
    choices = resolve_choices(**settings)
    if engine is None or wanted.table is not None or choices.keys not in BY_PAIRS:
        return choices
    return replace(choices, table=engine_named(engine).scope(per_layer=per_layer))


def _layers_may_differ(options: Mapping[str, Any]) -> bool:
    """Whether widths are chosen, or given, for each layer."""
    lists = (isinstance(options.get(side), list | tuple) for side in ("d_qk", "d_vo"))
    return bool(options.get("per_layer")) or any(lists)


def _widths_from_options(
    config: PretrainedConfig, choices: Choices, has_text: bool, options: Mapping[str, Any]
) -> tuple[Width, Width] | None:
    """(d_qk, d_vo) from a share of the cache or from explicit numbers; half of the cache when nothing is said.

    A side that is left out beside an explicit one keeps its full width. A share is split evenly, except where the
    statistics will be there to say better: then None.

    Raises:
        ValueError: both ways at once, a share outside (0, 1] or too small, or different layers where that cannot be.
    """
    kv, d_qk, d_vo = options.get("kv"), options.get("d_qk"), options.get("d_vo")
    engine, per_layer, head_dim = options.get("engine"), bool(options.get("per_layer")), head_dim_of(config)
    if kv is not None and (d_qk is not None or d_vo is not None):
        raise ValueError(
            f"--kv and --d-qk/--d-vo exclude each other: got kv={kv:g}, d_qk={d_qk}, d_vo={d_vo}; give one of the two"
        )
    if d_qk is not None or d_vo is not None:
        if per_layer:
            raise ValueError(
                f"--per-layer lets a plan choose the widths, but they were given: got d_qk={d_qk}, d_vo={d_vo}; leave "
                "it out, or give --kv"
            )
        return head_dim if d_qk is None else d_qk, head_dim if d_vo is None else d_vo
    share = 0.5 if kv is None else kv
    # A stride or a slice fits divisors of the head width alone, so there is nothing to choose.
    free = choices.keys in BY_PAIRS and choices.values != "slice"
    splits_by_text = choices.needs_statistics and has_text and free
    if per_layer and not splits_by_text:
        raise ValueError(
            "--per-layer needs statistics to tell layers apart: got no text, or choices that do not look at it; give "
            "--data FILE with the preset calibrated"
        )
    if share != 1 and (splits_by_text or engine is not None):
        candidates = candidates_for(
            head_dim, engine, choices.table, per_layer=per_layer, symmetric=not splits_by_text
        )
        splits = candidates.splits(share)
        if engine is not None:
            check_engine(engine, *splits[0], candidates.table, model_type=str(config.model_type))
        return None if splits_by_text else splits[-1]
    width = equal_widths(share, head_dim)
    return width, width
