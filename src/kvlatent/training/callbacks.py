"""What happens beside the steps of a stage: progress, the end by SIGTERM, and the end by a loss that has run away.

A checkpoint that comes due while the loss is far above what it was waits until it is not, so that what `keep` holds is from
before the loss ran away.
"""

from __future__ import annotations

import signal
import statistics
import threading
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from kvlatent.jobs.progress import Progress

__all__ = ["LossSpikes", "StepEnd", "Terminated", "Termination"]

SPIKE_STEPS = 20
"""So many steps in a row above the bound end a run; fewer are noise, or mend themselves."""

_WINDOW, _LEAST = 50, 20  # steps that the median is of; steps before it says anything


class Terminated(SystemExit):
    """A stage ended by SIGTERM with its state saved; its exit code is that of a process that SIGTERM ended, 143.

    Args:
        sentence: for people.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Termination(TrainerCallback):
    """Saves at the end of the step in which SIGTERM came, in every process where it came to one, and ends the training."""

    def __init__(self) -> None:
        self.asked = self.is_agreed = False  # of this process, of any of them
        self.stopped_at: int | None = None

    @contextmanager
    def listening(self) -> Generator[None]:
        """Take SIGTERM, where that is possible: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *ignored: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Called by the Trainer."""
        if state.global_step < state.max_steps and self.is_agreed:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
        return control


class LossSpikes:
    """Whether a stage's loss has run away: 20 steps in a row above the bound.

    The bound is `factor` times the median of the last 50 steps that were below it, and no less than the first step's loss.

    Args:
        factor: 0 looks at nothing.
        losses: of the steps that were taken before, where a stage goes on.
    """

    def __init__(self, factor: float, losses: list[float]) -> None:
        self.factor, self.row = factor, 0
        self.first = losses[0] if losses else None
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.loss = self.bound = 0.0
        for loss in losses:
            self.see(loss)

    def see(self, loss: float) -> None:
        """Take in the loss of a step."""
        if not self.factor:
            return
        self.first = loss if self.first is None else self.first
        if len(self.recent) >= _LEAST:
            bound = max(self.factor * statistics.median(self.recent), self.first)
            if loss > bound:
                self.row, self.loss, self.bound = self.row + 1, loss, bound
                return
        self.row = 0
        self.recent.append(loss)

    @property
    def ran_away(self) -> bool:
        """Whether the run should end."""
        return self.row >= SPIKE_STEPS


class StepEnd(TrainerCallback):
    """Tells the caller about every step, has the last one logged, and holds checkpoints back while the loss is too high."""

    def __init__(self, trainer: Any, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.save_is_due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed state brings the intervals of its checkpoint; those of the arguments hold."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Called by the Trainer."""
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        if state.global_step >= state.max_steps:
            control.should_log = True
        self._hold_back(loss, state, control)
        if state.is_world_process_zero:
            stage, speed = self.trainer.stage, self.trainer.tokens_per_second()
            self.progress.report(
                f"stage {'I' * stage}",
                state.global_step,
                state.max_steps,
                f"{speed:,.0f} tokens/s, loss {loss:.4f}",
                stage=stage,
                tokens_per_second=speed,
                loss=loss,
            )
        return control

    def _hold_back(self, loss: float, state: Any, control: Any) -> None:
        spikes = self.trainer.spikes
        spikes.see(loss)
        due = self.save_is_due or control.should_save
        control.should_save = due and (not spikes.row or state.global_step >= state.max_steps)
        self.save_is_due = due and not control.should_save
        if spikes.ran_away:
            self.trainer.stop_at_spike()
