"""What a run within a budget in minutes will take at least, from a few seconds of work right after loading.

A budget that is not enough for one step that learns is refused here, before the calibration and the measuring of widths;
where the estimate is too low, by their pace, and at last by what steps were measured to cost.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from kvlatent.conversion.narrow_divergences import work_of_widths
from kvlatent.conversion.step_costs import foresee_step_costs, forward_seconds
from kvlatent.jobs.devices import faster_dtype
from kvlatent.jobs.progress import Progress
from kvlatent.model.widths import Widths
from kvlatent.planning.candidates import equal_widths
from kvlatent.selection.choices import without_statistics
from kvlatent.selection.statistics import Statistics
from kvlatent.workflows.minutes import Budget, least_seconds
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.steps import convert_as_planned, load_statistics

__all__ = ["expect_steps"]

_BLOCKS = 5  # of the text, to take steps on: four learn and one measures
_CALIBRATION = 2  # forwards of the text that the calibration costs at least


def expect_steps(
    budget: Budget,
    model: PreTrainedModel,
    plan: Plan,
    text: Dataset | None,
    statistics: str | Path | None,
    progress: Progress,
    *,
    tokens_to_measure: int,
) -> None:
    """Tell the budget what will be taken at least by the steps up to the first that learns, and by the measuring.

    Args:
        model, plan: the original, and what is to become of it.
        text: blocks to learn from; or statistics, a file of an earlier calibration.
        tokens_to_measure: that models will read, in all.

    Raises:
        TooFewMinutes: the budget is not enough.
        ValueError, FileNotFoundError: as for `load_statistics`.
    """
    with budget.step("foresee the time"):
        progress.report("foresee the time")
        few, blocks = _some_blocks(model, plan, text, statistics)
        dtype = faster_dtype(model.config, model.device)
        if not plan.calibrates:
            forward_s = forward_seconds(model, few, dtype, budget.clock)
            budget.expect({"measuring": forward_s * tokens_to_measure})
            return
        start = budget.clock()
        latent = convert_as_planned(model, _likely(plan), None, without_statistics(plan.choices), Progress())
        convert_s = budget.clock() - start
        costs = foresee_step_costs(
            model,
            latent,
            few,
            plan.choices,
            blocks=blocks,
            seed=plan.recipe.seed,
            dtype=dtype,
            clock=budget.clock,
        )
    size = few.input_ids.shape[1]
    sizes = plan.num_layers, plan.head_dim, blocks, size
    conversions, tokens = (0, 0.0) if plan.widths else work_of_widths(*sizes, per_layer=plan.per_layer)
    calibrated = _CALIBRATION * blocks * size if statistics is None else 0
    budget.expect(
        {
            "calibration": costs.forward_s * calibrated,
            "widths": costs.forward_s * tokens + convert_s * conversions,
            "conversion": convert_s + least_seconds(costs) + costs.forward_s * tokens_to_measure,
        }
    )


def _some_blocks(
    model: PreTrainedModel, plan: Plan, text: Dataset | None, statistics: str | Path | None
) -> tuple[Statistics, int]:
    """A few blocks of the text to calibrate on, as statistics that say nothing else, and how many blocks it will be."""
    if statistics is not None and plan.calibrates:
        known, _ = load_statistics(statistics, model)
        ids, positions = known.input_ids, known.position_ids
        blocks = len(ids)
    else:
        assert text is not None
        blocks = min(len(text), plan.recipe.calibration.blocks)
        columns = text[: min(_BLOCKS, blocks)]
        ids, positions = (torch.as_tensor(columns[name]) for name in ("input_ids", "position_ids"))
    few = ids[:_BLOCKS], positions[:_BLOCKS]
    return Statistics((), *few, "", plan.num_key_value_heads, plan.head_dim), blocks


def _likely(plan: Plan) -> Plan:
    """The plan with its widths, or with equal ones where a text is to choose them."""
    if plan.widths is not None:
        return plan
    width = equal_widths(plan.kv, plan.head_dim)
    return replace(plan, widths=Widths(width, width))
