"""Stage II within a budget in minutes: its rate found by a short search, its tokens by the speed, its end by what it gains.

Everything is decided on blocks that are neither trained on nor reported on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.text.parts import Texts, first_blocks
from kvlatent.training.held_out_checks import CHECKS, Divergence
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import trainable_state
from kvlatent.workflows.minutes import Budget
from kvlatent.workflows.timed_conversion import Decide

__all__ = ["CONVERSION_SHARE", "Healing", "part_checked", "why_kept"]

# A budget's conversion and its stage II have one goal; the conversion learns faster at first, as it sees a layer at a
# time, and what it reaches is where stage II begins. The split itself has not been measured.
CONVERSION_SHARE = 0.4
"""Of what is left behind the calibration, less the measuring, for the conversion where a stage follows."""

RATES = (1 / 3, 1.0, 3.0)
"""Times the recipe's rate, to choose from."""

_TIMED = 3  # steps, of which the first warms up
_SEARCH_SHARE, _LEAST_TRIAL, _MOST_TRIAL = 0.15, 2, 16  # of the time that is left; steps at each rate
_CHECKED_TOKENS, _CHECKED_SHARE = 8192, 0.1  # of the training text, to decide on


_NO_TIME = (
    "no step of stage II fits into --minutes {minutes:g}, so the conversion is the result: up to one step the run takes about "
    "{needed:.2g} minutes; give more"
)


def part_checked(texts: Texts, block_size: int) -> tuple[Texts, Dataset]:
    """The texts less blocks at the end of what is trained on, and these.

    Raises:
        ValueError: there is but one block to train on.
    """
    assert texts.train is not None
    count = len(texts.train)
    if count < 2:
        raise ValueError(
            f"--minutes holds blocks out of the training text to decide on, which takes at least 2 blocks of {block_size} "
            f"tokens: got {count}; give more text, or a smaller data.block_size"
        )
    most = max(1, min(round(_CHECKED_SHARE * count), _CHECKED_TOKENS // block_size))
    checked = first_blocks(texts.train.select(range(count - most, count)), most * block_size, block_size)
    return texts._replace(train=texts.train.select(range(count - most))), checked


def why_kept(summary: Mapping[str, Any]) -> str | None:
    """The sentence of a stage that made nothing better, so that the conversion is kept; None where it did.

    Args:
        summary: of the stage, with its checks.
    """
    if summary["kept_step"]:
        return None
    first, *others = summary["checks"]
    least = min((row["divergence"] for row in others), default=first["divergence"])
    return (
        f"stage II made the model no better, so the conversion is what is kept: on blocks held out from training its "
        f"divergence from the original is {first['divergence']:.4f} nats a token, and {least:.4f} at the best of "
        f"{summary['steps']} steps; give more --minutes, or more text"
    )


@dataclass
class Healing:
    """What stage II of a run with a budget needs.

    Args:
        latent: prepared for training; original: on the same device.
        train, checked: blocks to train on, and to decide on.
        recipe: of the run.
        budget: of the run.
        work_dir: of the run.
        device: "cpu" or "cuda".
    """

    latent: PreTrainedModel
    original: PreTrainedModel
    train: Dataset
    checked: Dataset
    recipe: Recipe
    budget: Budget
    work_dir: Path
    device: str
    progress: Progress

    def __post_init__(self) -> None:
        """Nothing is computed before the first look."""
        self.divergence = Divergence(
            self.latent,
            self.original,
            self.checked,
            batch_size=self.recipe.stage2.batch_size,
            dtype=self.recipe.dtype,
        )

    def run(
        self, tokens_to_measure: int, searches: bool, decide: Decide
    ) -> tuple[Recipe | None, dict[str, Any], str | None]:
        """Decide on stage II and take it, or what of it is left.

        Args:
            tokens_to_measure: that models will read behind it.
            searches: the rate is open.
            decide: what remembers decisions.

        Returns:
            The recipe with what was decided, the stage's summary, and a sentence where it made nothing better. Where no step
            of it fits, no recipe, and what was decided.
        """
        budget = self.budget

        def search() -> dict[str, Any]:
            with budget.step("search of the rate"):
                found = self._search(tokens_to_measure, searches)
            return {**found, "rows": budget.rows, "spent_seconds": budget.spent_s}

        decided = decide("search", search)
        budget.rows = list(decided["rows"])
        budget.resume_at(decided["spent_seconds"])
        budget.reasons.append(decided["why"])
        if not decided["tokens"]:
            return (
                None,
                decided,
                _NO_TIME.format(minutes=budget.minutes, needed=decided["needed_seconds"] / 60),
            )
        keys = [f"stage2.{name}={decided[name]}" for name in ("tokens", "learning_rate")]
        recipe = Recipe.load(self.recipe, keys)
        summary = self._train(recipe)
        budget.resume_at(decided["spent_seconds"] + 60 * summary["minutes"])
        figures = {row["step"]: row["divergence"] for row in summary["checks"]}
        gained = {"before": figures[0], "after": figures[summary["kept_step"]]}
        row = {"step": "stage II", "steps": summary["steps"], "minutes": summary["minutes"], **gained}
        budget.rows.append(row)
        search_figures = {name: decided[name] for name in ("start", "trials", "why")}
        return recipe, {**summary, "search": search_figures}, why_kept(summary)

    def _search(self, tokens_to_measure: int, searches: bool) -> dict[str, Any]:
        """Rate and tokens of the stage, found by a few steps; the latent model is left as it was.

        Returns:
            "learning_rate"; "tokens", 0 where not one step fits; "needed_seconds" up to one step and what follows it;
            "start", the divergence, "trials" and "why"; JSON-able.
        """
        start = {name: tensor.clone() for name, tensor in trainable_state(self.latent).items()}
        base = self.recipe.stage2.learning_rate
        before, check_s = self._timed_check()
        step_s = self._step_seconds(base)
        self._put(start)
        measuring = tokens_to_measure * check_s / (len(self.checked) * self._size)
        left = self.budget.left_s - measuring - 2 * check_s
        trial_steps = min(_MOST_TRIAL, int(_SEARCH_SHARE * left / (len(RATES) * step_s + 1e-9)))
        trials: list[dict[str, Any]] = []
        rate, why = base, "the rate was given" if not searches else "no time for a search of the rate"
        if searches and trial_steps >= _LEAST_TRIAL:
            for factor in RATES:
                trials.append(
                    {"learning_rate": base * factor, "divergence": self._try(base * factor, trial_steps)}
                )
                self._put(start)
            finite = [row for row in trials if row["divergence"] is not None]
            rate = (
                min(finite, key=lambda row: row["divergence"])["learning_rate"] if finite else base * RATES[0]
            )
            why = f"the rate that did best of {len(RATES)} in {trial_steps} steps each on blocks held out from training"
        left, checking = self.budget.left_s - measuring, (CHECKS + 1) * check_s
        steps = max(0, int((left - checking) / max(step_s, 1e-9)))
        return {
            "learning_rate": rate,
            "tokens": steps * self._tokens_a_step,
            "needed_seconds": self.budget.spent_s + measuring + checking + step_s,
            "start": before,
            "trials": trials,
            "why": f"stage II at {rate:.3g}: {why}; {steps} steps at {step_s:.3g} s fit",
        }

    def _train(self, recipe: Recipe) -> dict[str, Any]:
        """Run stage II, or continue it, or put back what it had trained: its best weights on the blocks to decide on."""
        return train_stage(
            self.latent,
            self.original,
            2,
            self.train,
            recipe,
            self.work_dir / "stage2",
            device=self.device,
            progress=self.progress,
            divergence=self.divergence,
        )

    @property
    def _size(self) -> int:
        return len(self.train[0]["input_ids"])

    @property
    def _tokens_a_step(self) -> int:
        section = self.recipe.stage2
        return section.batch_size * section.gradient_accumulation * self._size

    def _timed_check(self) -> tuple[float, float]:
        """The divergence, and the seconds of a second look, behind the first that reads the original as well."""
        found, start = self.divergence(), self.budget.clock()
        self.divergence()
        return found, self.budget.clock() - start

    def _step_seconds(self, rate: float) -> float:
        marks: list[float] = []
        self._steps(rate, _TIMED, Progress(lambda **report: marks.append(self.budget.clock())))
        return (marks[-1] - marks[0]) / (len(marks) - 1)

    def _try(self, rate: float, steps: int) -> float | None:
        """The divergence behind so many steps; None where they are not finite."""
        try:
            self._steps(rate, steps, Progress())
        except ValueError:  # a loss or a gradient was not
            return None
        return self.divergence()

    def _steps(self, rate: float, steps: int, progress: Progress) -> None:
        folder = self.work_dir / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        keys = [f"stage2.tokens={steps * self._tokens_a_step}", f"stage2.learning_rate={rate}"]
        recipe = Recipe.load(self.recipe, [*keys, f"stage2.save_steps={steps + 1}"])
        try:
            train_stage(
                self.latent,
                self.original,
                2,
                self.train,
                recipe,
                folder,
                device=self.device,
                progress=progress,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.latent.get_parameter(name).data.copy_(tensor)
