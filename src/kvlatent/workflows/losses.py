"""Whether users would want a result, by what the held-out text says of it, and what they can do where they would not.

Perplexity alone is not enough: a cache that lost distant tokens costs little of it. What is proposed has been planned
with the same model, text and options, so it exists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from kvlatent.selection.choices import BLIND, BY_PAIRS, NO_DATA
from kvlatent.workflows.run_plan import Plan

__all__ = ["LEAST_KEPT", "MOST_RATIO", "judge_losses", "warn_of_losses"]

MOST_RATIO, LEAST_KEPT = 1.1, 0.9
"""Perplexity over the original's from which on, and share of its recall below which, a result is warned of."""

HEALING_MINUTES = 60
"""A budget to propose where nobody gave one."""

HEALING = f"train it with `kvlatent compress MODEL --data FILE --minutes {HEALING_MINUTES}`"
"""How a conversion is trained."""

_BUDGETS = 8  # eighths of the cache are proposed
_LEAST_MORE = 1 / 16  # share of the cache; less would hardly help


def judge_losses(
    command: str,
    figures: Mapping[str, Any],
    plan: Plan,
    options: Mapping[str, Any],
    replan: Callable[..., Plan],
) -> list[str]:
    """One sentence where the latent model's perplexity or recall says that users would not want it; else none.

    None either where nothing was measured, and where the plan says already that nothing was looked at.

    Args:
        command: that made it, "convert" or "compress".
        figures: of a run: "original" and "latent", or none.
        plan: of the run, with its widths.
        options: of the run, see `RUN_OPTIONS`.
        replan: `plan_run` of the same model and text, with other options.
    """
    latent = figures.get("latent", {})
    ratio, kept = latent.get("ratio"), (latent.get("recall") or {}).get("kept")
    if ratio is None or any(note in plan.notes for note in (BLIND, NO_DATA)):
        return []
    if ratio < MOST_RATIO and (kept is None or kept >= LEAST_KEPT):
        return []
    recall = (
        "" if kept is None else f", and {kept:.3f} of its recall is left (under {LEAST_KEPT:g} is little)"
    )
    sentence = (
        f"on held-out text a user would miss something: perplexity is x{ratio:.3f} the original's (x{MOST_RATIO:g} and "
        f"more is much){recall}; {_next_steps(command, plan, options, replan)}"
    )
    return [sentence]


def warn_of_losses(record: Mapping[str, Any]) -> None:
    """Raise the warnings of a record, at the line that called the workflow."""
    for sentence in record.get("warnings", ()):
        warnings.warn(sentence, stacklevel=3)


def _next_steps(command: str, plan: Plan, options: Mapping[str, Any], replan: Callable[..., Plan]) -> str:
    """What can be done: other options of the command that made the result, or to train it where that was not done."""

    def planned(**changes: Any) -> Plan | None:
        try:
            return replan(**{**options, **changes})
        except ValueError:  # which says why these options do not go together
            return None

    widths_given = options.get("d_qk") is not None or options.get("d_vo") is not None
    steps = []
    if (kv := _wider_budget(plan, planned)) is not None:
        steps.append(f"--kv {kv:g}" + (" instead of --d-qk and --d-vo" if widths_given else ""))
    if not plan.calibrates and (other := planned(preset="calibrated")) and other.calibrates:
        steps.append("--preset calibrated")
    if not plan.per_layer and not widths_given and planned(per_layer=True):
        steps.append("--per-layer")
    if plan.choices.keys in BY_PAIRS and plan.choices.table != "head" and planned(table="head"):
        steps.append("--table head")
    if command == "compress":
        steps.append(_more_training(plan, options, planned))
    said = [f"try `kvlatent {command}` with {_join(steps)}"] if steps else []
    return ", or ".join([*said, *([] if command == "compress" else [HEALING])])


def _more_training(plan: Plan, options: Mapping[str, Any], planned: Callable[..., Plan | None]) -> str:
    """The option that trains longer: a budget in minutes, twice the old one where there was one."""
    if (minutes := options.get("minutes")) is not None:
        return f"--minutes {2 * minutes:g}" + (" without --stages" if not plan.stages else "")
    if planned(minutes=HEALING_MINUTES, tokens=None, stages=None) is not None:
        instead = [f"--{name}" for name in ("tokens", "stages") if options.get(name) not in (None, "both")]
        return f"--minutes {HEALING_MINUTES}" + (f" instead of {' and '.join(instead)}" if instead else "")
    tokens = sum(plan.summary()["tokens"].values())
    return f"--tokens {2 * tokens}" if 2 in plan.stages else "--stages both"


def _wider_budget(plan: Plan, planned: Callable[..., Plan | None]) -> float | None:
    """The next budget below the whole cache that widths can be planned for; None where there is none."""
    share = plan.summary()["share"]
    for kv in (step / _BUDGETS for step in range(1, _BUDGETS)):
        if kv < share + _LEAST_MORE:
            continue
        wider = planned(kv=kv, d_qk=None, d_vo=None)
        if wider is not None and wider.summary()["share"] > share:
            return kv
    return None


def _join(steps: list[str]) -> str:
    """A, B or C."""
    return " or ".join([*([", ".join(steps[:-1])] if steps[1:] else []), *steps[-1:]])
