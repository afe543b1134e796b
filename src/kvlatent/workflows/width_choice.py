"""Which widths a share of the cache is spent on: by what narrow keys and narrow values are measured to cost the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from kvlatent.conversion.narrow_divergences import narrow_divergences
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.widths import Widths
from kvlatent.planning.predicted_errors import LayerErrors, measured_errors
from kvlatent.planning.width_plan import plan as plan_widths
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics
from kvlatent.workflows.run_plan import Plan

__all__ = ["measure_errors", "resolve_widths"]


def resolve_widths(
    plan: Plan, original: PreTrainedModel, statistics: Statistics | None, progress: Progress
) -> tuple[Plan, dict[str, Any] | None]:
    """The plan with its widths, and what is predicted of them where the text chose the split.

    What keys and values are worth is measured, layer by layer where layers may differ.

    Raises:
        ValueError: no widths keep so little of the cache.
    """
    if plan.widths is not None or statistics is None:
        return plan, None
    best = plan_widths(
        statistics,
        plan.kv,
        engine=plan.engine,
        table=plan.choices.table,
        per_layer=plan.per_layer,
        measured=measure_errors(
            original,
            statistics,
            plan.choices,
            plan.recipe,
            progress,
            per_layer=plan.per_layer,
        ),
    )
    return replace(plan, widths=Widths(best.d_qk, best.d_vo)), best.summary()


def measure_errors(
    model: PreTrainedModel,
    statistics: Statistics,
    choices: Choices,
    recipe: Recipe,
    progress: Progress,
    *,
    per_layer: bool,
) -> LayerErrors:
    """What narrow keys and narrow values cost the model: of each layer alone, or of all layers together."""
    qk_norm = recipe.conversion.qk_norm
    found = narrow_divergences(
        model, statistics, choices, per_layer=per_layer, qk_norm=qk_norm, progress=progress
    )
    return measured_errors(found, statistics.head_dim, choices.table)
