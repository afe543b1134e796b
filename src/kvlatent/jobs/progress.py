"""The one way in which a long job says how far it is.

A job takes a `Progress` and hands it on to its parts. Callers of the library hand in a plain function instead, of the
fields that they want to hear; `Progress.of` makes one into the other, so no job asks whether anybody listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Progress", "Report", "Step"]

Report = Callable[[str, int, int, str], None]
"""Called with a step's name, how much of it is done, of how much (0: unknown), and a note."""

_FIELDS = ("step", "done", "total", "note")


class Progress:
    """Where a job reports to; itself a `Report`.

    Args:
        tell: called with the fields of every report by name; None: nobody listens.
        place: said before the name of every step.
    """

    def __init__(self, tell: Callable[..., None] | None = None, place: str = "") -> None:
        self._tell, self._place = tell, place

    @classmethod
    def of(cls, caller: Progress | Callable[..., None] | None, fields: Sequence[str] = _FIELDS) -> Progress:
        """What a caller handed in: a progress as it is, None for silence, or a function of these fields."""
        if caller is None or isinstance(caller, Progress):
            return caller or cls()
        function = caller
        return cls(lambda **told: function(*(told[name] for name in fields)))

    def report(self, step: str, done: int = 0, total: int = 0, note: str = "", **figures: float) -> None:
        """Say how far a step is; `figures` are the numbers of the note, for functions of such fields."""
        if self._tell is not None:
            self._tell(step=self._place + step, done=done, total=total, note=note, **figures)

    def __call__(self, step: str, done: int, total: int, note: str) -> None:
        """As `report`."""
        self.report(step, done, total, note)

    def within(self, place: str) -> Progress:
        """The same, for a part of the work, whose steps are named after it."""
        return Progress(self._tell, f"{self._place}{place}: ")

    def step(self, name: str, total: int = 0, *, tokens: int = 0) -> Step:
        """Begin a step of `total` parts, of so many tokens each where the note is to say the tokens per second."""
        return Step(self, name, total, tokens)


class Step:
    """A step that is counted by who does it; 0 is reported at once. See `Progress.step`."""

    def __init__(self, progress: Progress, name: str, total: int = 0, tokens: int = 0) -> None:
        self.progress, self.name, self.total, self.tokens = progress, name, total, tokens
        self.done, self._start = 0, time.monotonic()
        self.to(0)

    def to(self, done: int, total: int | None = None) -> None:
        """So much is done, of as much as at the beginning unless told otherwise."""
        self.done, self.total = done, self.total if total is None else total
        told: dict[str, Any] = {}
        if self.tokens and done:
            speed = done * self.tokens / max(time.monotonic() - self._start, 1e-9)
            told = {"note": f"{speed:,.0f} tokens/s", "tokens_per_second": speed}
        self.progress.report(self.name, min(done, self.total) if self.total else done, self.total, **told)

    def advance(self, by: int = 1) -> None:
        """So much more is done."""
        self.to(self.done + by)
