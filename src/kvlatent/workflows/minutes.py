"""A budget in minutes: what is left of it, and how it is split between the steps of a conversion.

The split follows from measured seconds alone. What it decides goes into the recipe, so that a rerun needs no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, NoReturn

from datasets import Dataset

from kvlatent.conversion.step_costs import StepCosts
from kvlatent.evaluation.recall import MOST_TOKENS
from kvlatent.jobs.progress import Progress

__all__ = [
    "ALIGNMENTS",
    "PASSES",
    "Budget",
    "Split",
    "TooFewMinutes",
    "check_minutes",
    "global_steps_within",
    "keys_of",
    "least_seconds",
    "noted",
    "split_minutes",
    "tokens_to_measure",
]

ALIGNMENTS = (0, 25, 50, 100, 200)
"""Steps of alignment a layer to choose from; a cosine has to come down, so they are decided before the first."""

# On SmolLM2-135M at half the cache, 200 steps of alignment brought the divergence from .60 to .36 nats in the time of
# about 250 steps on all layers, and the first 32 steps on all layers from .65 to .49: these gain more a minute, but
# soon less, and they gain most on top of alignment.
ALIGNMENT_SHARE = 1 / 3
"""Of the time for steps, the share that alignment may take, as its gain is known only when it has been taken."""

PASSES = 8
"""Times that the global pass may read the calibration text."""

_DECIDED = ("tokens", "align", "global_steps")
_DECIDED_KEYS = ("stage1.tokens", "stage2.tokens", "conversion.align", "conversion.global_steps")
_SAVING = 0.02  # of the budget, for what nobody measures: loading, writing
_SURE = 0.9  # of what is foreseen, as other work on the machine comes and goes


class TooFewMinutes(ValueError):
    """A budget that is not enough for one step; nothing is worth keeping then."""


class Budget:
    """Minutes of a whole run, counted from here.

    Args:
        minutes: asked for.
        clock: seconds since whenever.

    `rows` are the steps that were taken, `reasons` why those behind the conversion were.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] | None = None) -> None:
        self.minutes, self.clock = minutes, clock or monotonic
        self._start = self.clock()
        self.rows: list[dict[str, Any]] = []
        self.reasons: list[str] = []
        self._expected: dict[str, float] = {}

    @property
    def spent_s(self) -> float:
        """Seconds that are gone, in this call and in those that it continues."""
        return self.clock() - self._start

    @property
    def left_s(self) -> float:
        """Seconds that are left, less what nobody measures."""
        return 60 * self.minutes * (1 - _SAVING) - self.spent_s

    def resume_at(self, spent_s: float) -> None:
        """A call before this one had spent so much when it was this far."""
        self._start = min(self._start, self.clock() - spent_s)

    @contextmanager
    def step(self, name: str) -> Generator[dict[str, Any]]:
        """Note the minutes of a step, beside what it gained, which is put into the row."""
        start = self.clock()
        row: dict[str, Any] = {"step": name}
        yield row
        row["minutes"] = round((self.clock() - start) / 60, 4)
        self.rows.append(row)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say what steps will take at least, by their names; each stands until it begins.

        Raises:
            TooFewMinutes: they do not fit.
        """
        self._expected = dict(seconds)
        self._look_ahead(0)

    def watch(self, name: str, progress: Progress) -> Progress:
        """The same progress, for a step before the first that learns: it ends when no time is left, or when by its pace
            none will be for those behind it.

        Raises:
            TooFewMinutes: from a report.
        """
        self._expected.pop(name, None)
        marks: dict[str, tuple[int, float]] = {}

        def tell(step: str, done: int, total: int, note: str, **figures: float) -> None:
            if self.left_s <= 0:
                self.refuse(self.spent_s * max(1.0, total / done if done else 1.0))
            if done:  # the first part warms up
                begun, start = marks.setdefault(step, (done, self.clock()))
                pace = (self.clock() - start) / max(1, done - begun)
                self._look_ahead(pace * (total - done))
            progress.report(step, done, total, note, **figures)

        return Progress(tell)

    def _look_ahead(self, rest_s: float) -> None:
        """Refuse where a step that has so many seconds left, and those that are expected behind it, do not fit."""
        needed = self.spent_s + rest_s + sum(self._expected.values())
        if _SURE * (needed - self.spent_s) > self.left_s:
            self.refuse(needed, foreseen=True)

    def summary(self, conversion: dict[str, Any]) -> dict[str, Any]:
        """Minutes asked for and spent, why they were split so, and what each step took and gained; JSON-able.

        Args:
            conversion: figures of `convert_in_minutes`, whose share of this is taken out.
        """
        for name in ("steps", "decided", "spent_seconds"):
            conversion.pop(name, None)
        self.reasons.insert(0, conversion.pop("why", "the conversion takes no steps"))
        spent = round(self.spent_s / 60, 4)
        return {"asked": self.minutes, "spent": spent, "why": "; ".join(self.reasons), "steps": self.rows}

    def refuse(self, needed_s: float, *, foreseen: bool = False) -> NoReturn:
        """Raise `TooFewMinutes`: up to one step that learns, and with the measuring behind it, the run takes so long.

        Args:
            foreseen: that is an estimate.
        """
        least = needed_s / 60
        raise TooFewMinutes(
            "--minutes has to be enough for the calibration, one step that learns and the measuring, which take "
            f"{'about' if foreseen else 'at least'} {_rounded_up(least):g} on this machine: got {self.minutes:g}; try --minutes {_rounded_up(2 * least):g}, or "
            "fewer --blocks"
        )


@contextmanager
def noted(budget: Budget | None, name: str, progress: Progress) -> Generator[Progress]:
    """A step before the first that learns; the progress to tell of it, which ends it once no time is left."""
    if budget is None:
        yield progress
        return
    with budget.step(name):
        yield budget.watch(name, progress)


def tokens_to_measure(blocks: Dataset | None, *, models: int, recalls: int) -> int:
    """That so many models read when they are measured on these blocks, and for their recall; 0 without blocks."""
    if blocks is None:
        return 0
    return models * len(blocks) * len(blocks[0]["input_ids"]) + recalls * MOST_TOKENS


def check_minutes(options: Mapping[str, Any]) -> None:
    """Check an option of a run against those beside it.

    Raises:
        ValueError: no positive number, or something else that it decides.
    """
    minutes = options.get("minutes")
    if minutes is None:
        return
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be a positive number: got {minutes:g}; try 15, or leave it out")
    named = [
        f"--{name.replace('_', '-')} {options[name]}" for name in _DECIDED if options.get(name) is not None
    ]
    overrides = list(options.get("overrides") or ())
    both = zip(keys_of(overrides), overrides, strict=True)
    named += [f"--set {each}" for key, each in both if key in _DECIDED_KEYS]
    if named:
        raise ValueError(
            f"--minutes decides the steps and tokens of a run itself: got --minutes {minutes:g} and {', '.join(named)}; "
            "leave out one or the other"
        )


def keys_of(overrides: Iterable[str] | None) -> list[str]:
    """The keys of `section.key=value` overrides, in order."""
    return [each.partition("=")[0].strip() for each in overrides or ()]


@dataclass(frozen=True)
class Split:
    """Steps that fit a budget: of alignment in every layer, and on all layers at once; and why."""

    align: int
    global_steps: int
    reason: str


def split_minutes(seconds: float, costs: StepCosts, *, most_global_steps: int) -> Split | None:
    """The steps of alignment and of the global pass that fit into so many seconds; None where not one does.

    Alignment takes as many as fit into its share; the global pass what is left, up to `most_global_steps`; what that
    leaves goes to alignment again.
    """
    left = seconds - costs.refine_s
    align = _most_alignment(ALIGNMENT_SHARE * left, costs)
    steps = global_steps_within(left - align * costs.align_s, costs, most_global_steps)
    why = f"alignment may take {ALIGNMENT_SHARE:.0%} of the {left:,.0f} s that are left for steps"
    if steps == most_global_steps:
        rest = left - costs.global_start_s - steps * costs.global_s
        align = max(align, _most_alignment(rest, costs))
        why += f", the global pass reads the text {PASSES} times at most"
    elif steps == 0:
        align = _most_alignment(left, costs)
        why += ", and a step on all layers does not fit beside it"
    if align == steps == 0:
        return None
    told = f"{align} steps a layer at {costs.align_s:.3g} s, about {steps} on all layers at {costs.global_s:.3g} s"
    return Split(align, steps, f"{why}: {told}")


def global_steps_within(seconds: float, costs: StepCosts, most: int) -> int:
    """Steps of the global pass that fit into so many seconds."""
    fit = (seconds - costs.global_start_s) / max(costs.global_s, 1e-9)
    return max(0, min(most, math.floor(min(fit, most))))


def least_seconds(costs: StepCosts) -> float:
    """Of the cheapest step that learns, with what comes before it."""
    return costs.refine_s + min(ALIGNMENTS[1] * costs.align_s, costs.global_start_s + costs.global_s)


def _most_alignment(seconds: float, costs: StepCosts) -> int:
    return max((steps for steps in ALIGNMENTS if steps * costs.align_s <= seconds), default=0)


def _rounded_up(value: float) -> float:
    """To two digits."""
    digits = 1 - math.floor(math.log10(max(value, 1e-9)))
    return round(math.ceil(value * 10**digits) / 10**digits, max(0, digits))
