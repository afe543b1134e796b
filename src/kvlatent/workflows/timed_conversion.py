"""A conversion within a budget in minutes: measure what steps cost here, split the time, take them, note what each gained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from kvlatent.conversion.global_pass import blocks_of_a_step, held_out_divergence
from kvlatent.conversion.step_costs import StepCosts, measure_step_costs
from kvlatent.conversion.text_tuning import frozen_pair, tune_on_text
from kvlatent.jobs.devices import faster_dtype
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.selection.statistics import Statistics
from kvlatent.text.recall_blocks import held_out_blocks
from kvlatent.workflows.minutes import PASSES, Budget, global_steps_within, least_seconds, split_minutes
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.steps import conversion_figures, convert_as_planned

__all__ = ["Decide", "convert_in_minutes", "decide_at_once", "resume_conversion"]

Decide = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""Of a decision's name and of what makes it: what was decided, now or by an earlier call of the same run."""


def decide_at_once(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """For runs that are not continued."""
    return make()


def convert_in_minutes(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics,
    budget: Budget,
    progress: Progress,
    *,
    tokens_to_measure: int,
    share: float = 1.0,
    decide: Decide = decide_at_once,
) -> tuple[Plan, PreTrainedModel, dict[str, Any]]:
    """The plan with its steps, the latent model, and what `convert_and_report` says of it, with what
        `Budget.summary` and `resume_conversion` read.

    Args:
        model, statistics: as for `convert_and_report`.
        plan: with its widths.
        budget: of the whole run.
        tokens_to_measure: that models will read behind it, in all.
        share: of what is left beside the measuring, for the conversion.
        decide: what remembers decisions.

    Raises:
        ValueError: the minutes are too few for one step.
    """
    start = budget.clock()
    closed = replace(plan.choices, refit=False, align=0, global_steps=0)
    with budget.step("closed form"):
        progress.report("convert")
        latent = convert_as_planned(model, plan, statistics, closed, progress)
    run = _Tuning(model, latent, plan, statistics, progress)

    def split() -> dict[str, Any]:
        with budget.step("measure the speed"):
            progress.report("measure the speed")
            costs = run.costs(budget.clock)
        measuring = costs.forward_s * tokens_to_measure
        left = budget.left_s - measuring
        # Where its share is too little for a step, what follows has to do with less.
        for seconds in (share * left, left):
            chosen = split_minutes(seconds, costs, most_global_steps=run.most_steps)
            if chosen is not None:
                break
        else:
            budget.refuse(budget.spent_s + measuring + least_seconds(costs))
        shown = {"costs": asdict(costs), "seconds": seconds, "spent_seconds": budget.spent_s}
        return {**asdict(chosen), **shown}

    decided = decide("split", split)
    budget.resume_at(decided["spent_seconds"])
    costs = StepCosts(**decided["costs"])
    with budget.step("alignment and refit" if plan.choices.refit else "alignment") as row:
        row |= {"steps": decided["align"], "before": run.divergence()}
        run.take(align=decided["align"])
        row["after"] = run.divergence()

    def recount() -> dict[str, Any]:
        left = decided["seconds"] - (budget.spent_s - decided["spent_seconds"])
        # By the clock again, as alignment may have stopped early or started anew.
        fit = global_steps_within(left, costs, run.most_steps) if decided["global_steps"] else 0
        return {"steps": fit, "spent_seconds": budget.spent_s}

    again = decide("global-pass", recount)
    budget.resume_at(again["spent_seconds"])
    steps = {"align": decided["align"], "global_steps": again["steps"]}
    with budget.step("global pass") as row:
        row |= {"steps": again["steps"], **run.take(global_steps=again["steps"]).get("global_pass", {})}
    figures = conversion_figures(model, latent, plan, statistics, budget.clock() - start, progress)
    figures |= {"why": decided["reason"], "steps": list(budget.rows), "decided": steps}
    return _with_steps(plan, **steps), latent, figures | {"spent_seconds": budget.spent_s}


def resume_conversion(plan: Plan, budget: Budget, figures: dict[str, Any]) -> Plan:
    """The plan with its steps, and the budget as it was, behind a conversion that an earlier call finished."""
    if "decided" not in figures:
        return plan
    budget.rows = list(figures["steps"])
    budget.resume_at(figures["spent_seconds"])
    return _with_steps(plan, **figures["decided"])


class _Tuning:
    """One conversion that is being tuned in place.

    Args:
        model: the original; latent: converted from it in closed form.
        plan, statistics, progress: of the run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        latent: PreTrainedModel,
        plan: Plan,
        statistics: Statistics,
        progress: Progress,
    ) -> None:
        self.model, self.latent, self.statistics = model, latent, statistics
        self.choices, self.progress = plan.choices, progress
        self.given: dict[str, Any] = {
            "seed": plan.recipe.seed,
            "dtype": faster_dtype(model.config, model.device),
        }

    @property
    def most_steps(self) -> int:
        """Of the global pass."""
        blocks, size = self.statistics.input_ids.shape
        learnt = blocks - len(held_out_blocks(blocks))
        return max(1, PASSES * learnt // blocks_of_a_step(size))

    def costs(self, clock: Callable[[], float]) -> StepCosts:
        """Of the steps, here and now."""
        return measure_step_costs(
            self.model, self.latent, self.statistics, self.choices, **self.given, clock=clock
        )

    def divergence(self) -> float | None:
        """From the original, on the held-out calibration blocks, in nats a token."""
        with frozen_pair(self.model, self.latent) as twin:
            return held_out_divergence(twin, self.latent, self.statistics, dtype=self.given["dtype"])

    def take(self, *, align: int | None = None, global_steps: int = 0) -> dict[str, Any]:
        """Refit and align, or run the global pass; returns what `tune_on_text` measured."""
        choices = replace(self.choices, align=align or 0, global_steps=global_steps)
        if align is None:
            choices = replace(choices, refit=False)
        return tune_on_text(
            self.model, self.latent, self.statistics, choices, **self.given, progress=self.progress
        )


def _with_steps(plan: Plan, align: int, global_steps: int) -> Plan:
    """The plan with what was decided, in its recipe, too."""
    keys = [f"conversion.align={align}", f"conversion.global_steps={global_steps}"]
    choices = replace(plan.choices, align=align, global_steps=global_steps)
    return replace(plan, choices=choices, recipe=Recipe.load(plan.recipe, keys))
