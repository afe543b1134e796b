"""What a check of `kvlatent eval` is: one record, which the check's own file fills in and everything else reads.

A new metric is a file in `checks/` that ends with such a record, and its line in `checks/__init__.py`. From the record
come the names of the options that it reads, what they refuse, how much is measured where nobody said, the measurement,
the rows that people see, and what its figures say of a failure. How an option is typed and explained is declared once,
in `kvlatent_cli.measure`, whose `--help` imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from kvlatent.evaluation.evidence import Figures, Sign
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.jobs.progress import Progress, Step
from kvlatent.model.time_estimate import assumed_speed, forward_operations

__all__ = [
    "BATCH_SIZE",
    "BLOCK_SIZE",
    "DATA",
    "Check",
    "CheckRequest",
    "Levels",
    "Settings",
    "grid_mean",
    "run_each",
]

Settings = dict[str, Any]
Levels = list[tuple[Settings | None, float]]
"""What could be measured, ascending, each with its seconds; None leaves the check out."""


DATA = "data"
"""Argument of a check that reads the text."""

BLOCK_SIZE = "block_size"
BATCH_SIZE = "batch_size"


@dataclass(frozen=True)
class CheckRequest:
    """What an evaluation works on.

    Args:
        models: "latent" and, where there is one to compare with, "original".
        tokenizer: of the text.
        text: what the checks with `DATA` read.
        given: values of arguments by name, None where nobody chose.
        window: tokens of a window of perplexity and fidelity, and at most of order.
        limit: the shortest context of the models; None where their configs name none.
        seed: of everything random.
    """

    models: Mapping[str, Any]
    tokenizer: Any
    text: ScoredText
    given: Mapping[str, Any]
    window: int
    limit: int | None
    seed: int

    def seconds(self, length: int, rows: float, *, scored: bool = False) -> float:
        """Of reading so many sequences with every model, by the estimate; `scored` as in `forward_operations`."""
        return rows * sum(
            forward_operations(model, length, scored=scored) / assumed_speed(model.device, model.dtype)
            for model in self.models.values()
        )


Run = Callable[[CheckRequest, Settings, Progress], Figures]


@dataclass(frozen=True)
class Check:
    """One thing that is measured.

    Args:
        name: on the command line and in the document.
        arguments: names of the options that it reads, of `standard_evaluation` and of the command (with dashes there);
            None, the default of each, leaves the choice to the check. One with `DATA` reads the text.
        refuse: raises, before any model runs, what `run` would raise for its `options`.
        run: measures with its `options`, and tells of a step at once, before it has read its text.
            Its figures stand by role ("latent", "original"), those of the pair beside them.
        extents: how much could be measured; without, it is as much as the arguments say, and no time is set aside.
        may_be_left_out: where even its smallest extent takes too long and nobody named it or an argument of its alone.
        units: of its settings, in a sentence that says how many are left out.
        more: how to get all of it, in the same sentence.
        needs_original: it compares the two models.
        is_random: it draws, and takes a seed.
        asked_by: the argument that asks for it; without, it is measured unless others are named.
        rows: of the listing, by label, what is shown of the figures of a model that was measured; given the latent one's.
        lines: sentences below the listing, from all figures.
        signs: what its figures say of a failure, by the failure's name (see `diagnosis`).
    """

    name: str
    arguments: tuple[str, ...]
    refuse: Callable[[CheckRequest, Settings], Any]
    run: Run
    extents: Callable[[CheckRequest], Levels] | None = None
    may_be_left_out: bool = False
    units: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[CheckRequest], str] | None = None
    needs_original: bool = False
    is_random: bool = True
    asked_by: str | None = None
    rows: Callable[[Figures], Mapping[str, Callable[[Figures], str]]] = lambda _: {}
    lines: Callable[[Figures], list[str]] = lambda _: []
    signs: Mapping[str, Callable[[Figures, list[str]], Sign]] = field(default_factory=dict)

    def options(self, request: CheckRequest, settings: Settings) -> Settings:
        """What `refuse` and `run` are given: its settings, and the arguments that only reach a measurement."""
        shared = {DATA, BLOCK_SIZE, self.asked_by}
        given = {each: request.given[each] for each in self.arguments if each not in shared}
        return given | settings | ({"seed": request.seed} if self.is_random else {})


def run_each(
    name: str,
    measure: Callable[[Any, CheckRequest, Step, Settings], Any],
    compare: Callable[[Any, Any], Any] | None = None,
) -> Run:
    """A check's `run` that measures one model after the other.

    Args:
        name: of the check, under which the figures stand.
        measure: of a model, with the step to report to and the check's `options`.
        compare: of the original's figures and the latent model's.
    """

    def run(request: CheckRequest, options: Settings, progress: Progress) -> Figures:
        figures: dict[str, Any] = {
            role: {name: measure(model, request, progress.step(f"{name}, {role}"), options)}
            for role, model in request.models.items()
        }
        if compare is not None and "original" in figures:
            figures[name] = compare(figures["original"][name], figures["latent"][name])
        return figures

    return run


def grid_mean(grid: list[list[float]], unit: str = "") -> str:
    """Mean over the cells of a grid."""
    return f"{fmean(value for row in grid for value in row):.3f}{unit}"
