"""The record of a checkpoint that goes on from another: its plan, its training, and what came before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlatent.checkpoints.load import load_config
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig, table_scope
from kvlatent.model.families import attention_layers_of, key_value_heads_of
from kvlatent.model.widths import Widths
from kvlatent.selection.choices import BLIND, BY_PAIRS, PRESETS, UNMEASURED, Choices
from kvlatent.workflows.run_plan import Plan

__all__ = ["continue_history", "describe_as_before", "load_latent_config", "plan_of_latent"]

_UNTRAINED = (BLIND, UNMEASURED)  # notes that training makes void


def load_latent_config(model: str | Path) -> Any:
    """The transformers config of a latent checkpoint.

    Raises:
        ValueError: it is not latent; FileNotFoundError: there is none.
    """
    config = load_config(str(model))
    if not getattr(config, "kv_latent", None):
        raise ValueError(f"{model} is not a latent checkpoint; make one with kvlatent convert first")
    return config


def plan_of_latent(
    config: Any,
    recipe: Recipe,
    widths: Widths | None = None,
    *,
    stages: tuple[int, ...] = (),
    device: str = "cpu",
    seconds: float = 0.0,
) -> Plan:
    """What is done with a latent checkpoint, whose choices and widths (unless others are given) it says itself."""
    latent = latent_config_of(config)
    return Plan(
        choices=Choices(latent.keys, latent.frequencies, latent.values, latent.scale, _table_of(latent)),
        kv=1.0,
        widths=widths or latent.widths,
        head_dim=latent.original_head_dim,
        num_layers=len(attention_layers_of(config)),
        num_key_value_heads=key_value_heads_of(config),
        recipe=recipe,
        stages=stages,
        device=device,
        stored_dtype=config.dtype,
        seconds=seconds,
    )


def _table_of(latent: LatentConfig) -> str:
    """Who shares kept pairs; one table where all keys keep the same channels by rule."""
    return table_scope(latent) if latent.keys in BY_PAIRS else "model"


def continue_history(previous: Mapping[str, Any], plan: Plan, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe_as_before` says, with this stage's summary."""
    training = {**previous.get("training", {}), f"stage{summary['stage']}": dict(summary)}
    described = describe_as_before(previous, plan, training)
    kept = [note for note in described["plan"]["notes"] if note not in _UNTRAINED]
    return described | {"plan": described["plan"] | {"notes": kept}}


def describe_as_before(
    previous: Mapping[str, Any], plan: Plan, training: Mapping[str, Any]
) -> dict[str, Any]:
    """Plan, training and figures (none: they were the source's) of a record that goes on from `previous`, and that."""
    before = previous.get("plan", {})
    conversion = ("preset", "choices", "engine", "calibration_blocks")
    described = plan.summary() | {"preset": _preset(plan.choices), "calibration_blocks": 0}
    described |= {name: before[name] for name in conversion if name in before}
    described["notes"] = list(before.get("notes", ()))
    described["tokens"] = {name: training[name]["tokens"] for name in sorted(training)}
    kept = ("command", "sha256", "calibration", "conversion", "training", "figures")
    earlier = [{name: previous[name] for name in kept if name in previous}] if previous else []
    return {
        "plan": described,
        "training": dict(training),
        "figures": {},
        "earlier": [*previous.get("earlier", []), *earlier],
    }


def _preset(choices: Choices) -> str:
    """The preset that a latent config looks like: of the choices it knows keys, frequencies, values and scale."""

    def known(one: Choices) -> tuple[str, ...]:
        return one.keys, one.frequencies, one.values, one.scale

    return next((name for name, preset in PRESETS.items() if known(preset) == known(choices)), "custom")
