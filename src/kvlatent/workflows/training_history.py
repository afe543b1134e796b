"""What a checkpoint carries about its making, when one more stage is trained on it.

`run.json`, `metrics.jsonl` and the model card of the source are continued, not replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import joined_metrics, spoken_name
from kvlatent.selection.choices import BLIND, PRESETS, UNMEASURED, Choices
from kvlatent.workflows.run_plan import Plan

__all__ = ["history", "in_place", "joined_journal", "options_of"]

_UNTRAINED = (BLIND, UNMEASURED)  # notes that training makes void


def in_place(model: str | Path, out: str | Path) -> bool:
    """Whether the output replaces its own source."""
    return Path(out).resolve() == Path(model).resolve()


def history(previous: Mapping[str, Any], plan: Plan, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Plan, training and figures (none: they were the source's) of the record, and what was done before."""
    training = {**previous.get("training", {}), f"stage{summary['stage']}": dict(summary)}
    before = previous.get("plan", {})
    conversion = ("preset", "choices", "engine", "calibration_blocks")
    described = plan.summary() | {"preset": _preset(plan.choices), "calibration_blocks": 0}
    described |= {name: before[name] for name in conversion if name in before}
    notes: Iterable[str] = before.get("notes", ())
    described["notes"] = [note for note in notes if note not in _UNTRAINED]
    described["tokens"] = {name: training[name]["tokens"] for name in sorted(training)}
    kept = ("command", "sha256", "calibration", "conversion", "training", "figures")
    earlier = [{name: previous[name] for name in kept if name in previous}] if previous else []
    return {
        "plan": described,
        "training": training,
        "figures": {},
        "earlier": [*previous.get("earlier", []), *earlier],
    }


def _preset(made: Choices) -> str:
    """The preset that a latent config looks like: of the choices it knows keys, frequencies, values and scale."""

    def known(choices: Choices) -> tuple[str, ...]:
        return choices.keys, choices.frequencies, choices.values, choices.scale

    return next((name for name, choices in PRESETS.items() if known(choices) == known(made)), "custom")


def joined_journal(model: str | Path, stage: int, journal: Path) -> str:
    """The source's metrics, and after them this stage's."""
    old = Path(model) / journal.name
    before = old.read_text(encoding="utf-8") if old.is_file() else ""
    return before + joined_metrics([(f"stage{stage}", journal)])


def options_of(
    model: Any, stage: int, data: Any, out: Any, teacher: Any, recipe: Any, overrides: list[str], device: str
) -> dict[str, Any]:
    """The options of a call as the command line spells them."""
    return {
        "stage": stage,
        "data": spoken_name(data),
        "teacher": None if teacher is None else spoken_name(teacher),
        "out": None if in_place(model, out) else Path(out).name,
        "recipe": None if recipe is None or isinstance(recipe, Recipe) else Path(recipe),
        "set": overrides,
        "device": device,
    }
