"""Running a study: measuring the cells that are not finished and that no other process is at."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import environment
from kvlatent_lab.study.folder import StudyFolder
from kvlatent_lab.study.grid_cells import Cell
from kvlatent_lab.study.measure_cell import forget
from kvlatent_lab.study.request import StudyRequest, resolve_request
from kvlatent_lab.study.study_cell import StudyCell, numeric
from kvlatent_lab.study.subject import Subject

__all__ = ["EVAL_TOKENS", "study"]

EVAL_TOKENS = 32_768


def study(
    name: str,
    model: str | Path | None = None,
    *,
    out: str | Path,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    tokens: int | None = None,
    eval_tokens: int = EVAL_TOKENS,
    cells: str | None = None,
    limit: int | None = None,
    recipe: str | Path | None = None,
    overrides: Iterable[str] = (),
    threads: int | None = None,
    device: str = "auto",
    python: str | None = None,
    dry_run: bool = False,
    progress: Progress | Report | None = None,
) -> dict[str, Any]:
    """Run a study, or what is left of it; every cell is one JSON file in `out`.

    A call that was killed goes on when it is repeated, and several processes with the same `out` share the cells. A cell
    that cannot be measured (its training diverges, say) is a result, too: its file says why and holds no figures; delete
    a file to have its cell measured again.

    Args:
        name: of the study, see `STUDIES`.
        model: directory, hub id or GGUF file of the original; None is the embedded model.
        out: the results' directory.
        data: text to calibrate and train on; None, for the embedded model, is the standard library's.
        eval_data: text to measure on; None takes a part held out from `data`.
        seeds: one cell each where a seed changes anything; None takes the study's own.
        tokens: of training, all stages of a cell together; None takes the study's own, which may be none at all.
        eval_tokens: measure on at most that many tokens.
        cells: run only those whose name matches a shell pattern, or one of several separated by commas.
        limit: measure at most that many cells in this call.
        recipe: YAML file; overrides: `section.key=value` strings on top of it.
        threads: of torch, while the study runs; None leaves them.
        device: "auto", "cpu" or "cuda".
        python: interpreter of an environment with kvpress (token-eviction only).
        dry_run: name the cells, and write nothing.
        progress: told of every step, which is named after its cell.

    Returns:
        {"study", "out", "cells": names in order, "finished": names, "measured": by this call, "elsewhere": being measured
        by other processes, "redone": {name: what was wrong with its file}, "failed": {name: why it has no figures},
        "impossible": {name: why its widths do not fit the model}}.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, OSError: one sentence naming what is wrong and what to do.
    """
    for flag, value in (("--eval-tokens", eval_tokens), ("--limit", limit), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1: got {value}; raise it or leave it out")
    asked = resolve_request(
        name,
        model,
        out,
        data=data,
        eval_data=eval_data,
        seeds=seeds,
        tokens=tokens,
        eval_tokens=eval_tokens,
        cells=cells,
        recipe=recipe,
        overrides=overrides,
        threads=threads,
        device=device,
        python=python,
    )
    needs = asked.grid.requires
    tools = None if needs is None or dry_run else needs(python)
    inputs = {"model": asked.source.model, "data": data, "eval-data": eval_data, "recipe": recipe}
    folder = StudyFolder(out, asked.grid.name, asked.decides(tools), inputs)
    run = Run(asked, folder, tools, Progress.of(progress))
    if not dry_run:
        created = folder.join()
        try:
            with _threads(threads):
                run.until_done(limit)
        except BaseException:
            if created and not run.begun:
                folder.abandon()
            raise
    return run.report()


def _cpu_seconds() -> float:
    """That this process and its finished children have used: what a cell costs on a machine that others use, too."""
    return sum(os.times()[:4])


@contextmanager
def _threads(number: int | None) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Run:
    """One call of `study` in flight.

    Args:
        asked: the call; folder: of the results.
        tools: what `Grid.requires` returned.
        progress: told of every step.
    """

    def __init__(
        self, asked: StudyRequest, folder: StudyFolder, tools: dict[str, Any] | None, progress: Progress
    ) -> None:
        self.asked, self.folder, self.tools, self.progress = asked, folder, tools, progress
        self.subject: Subject | None = None
        self.begun = False
        self.measured: list[str] = []
        self.busy: set[str] = set()
        self.redone: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def until_done(self, limit: int | None) -> None:
        """Measure what is left, in order; cells of other processes are looked at again while there is other work."""
        while todo := [cell for cell in self.asked.cells if not self._done(cell)]:
            before = len(self.measured)
            for cell in todo:
                if limit is not None and len(self.measured) >= limit:
                    return
                with self.folder.claim(cell.name) as mine:
                    if not mine:
                        self.busy.add(cell.name)
                    elif not self._done(cell):
                        self._measure(cell)
            if len(self.measured) == before:
                return

    def _done(self, cell: Cell) -> bool:
        """Whether there is a sound result; what is wrong with another is noted."""
        try:
            document = self.folder.result(cell.name, cell.settings)
        except ValueError as error:
            self.redone[cell.name] = str(error)
            return False
        if document is not None and "failed" in document["record"]:
            self.failed[cell.name] = document["record"]["failed"]
        return document is not None

    def _subject(self) -> Subject:
        """Model and texts, loaded and checked by the first cell; a text that cannot be read ends the study, not a cell."""
        if self.subject is None:
            asked = self.asked
            self.subject = Subject(
                asked.source,
                self.folder,
                asked.recipe,
                eval_tokens=asked.eval_tokens,
                tokens=asked.scale.tokens,
                device=asked.device,
                python=None if self.tools is None else self.tools["python"],
            )
            self.subject.original()
            if asked.grid.check is not None:
                asked.grid.check(self.subject)
        self.begun = True
        return self.subject

    def _measure(self, cell: Cell) -> None:
        """Measure one cell and write its result."""
        asked, subject = self.asked, self._subject()
        place = f"{asked.cells.index(cell) + 1}/{len(asked.cells)} {cell.name}"
        wall, cpu = time.monotonic(), _cpu_seconds()
        failed: dict[str, str] = {}
        try:
            figures = asked.grid.figures(subject, cell, self.progress.within(place))
            if not numeric(figures):
                raise ValueError("a figure is not a finite number")
        except ValueError as error:
            figures, failed = {}, {"failed": str(error).replace(f"{self.folder.work}/", "")}
        record = {
            **environment(asked.device),
            "command": asked.command(cell),
            "seed": cell.seed,
            "seconds": round(time.monotonic() - wall, 2),
            "cpu_seconds": round(_cpu_seconds() - cpu, 2),
            "cache_dtype": str(subject.dtype).removeprefix("torch."),
            **({} if self.tools is None else {"tools": self.tools["versions"]}),
            **failed,
        }
        document = {
            "kind": "study",
            "study": asked.grid.name,
            "cell": cell.name,
            "model": {"name": asked.source.name, "fingerprint": self.folder.plan["model"]},
            "settings": cell.settings,
            "figures": figures,
            "record": record,
        }
        self.folder.finish(cell.name, StudyCell.checked(document))
        forget(subject, cell)
        self.measured.append(cell.name)
        if failed:
            self.failed[cell.name] = failed["failed"]

    def report(self) -> dict[str, Any]:
        """What the call did and found; see `study`."""
        names = [cell.name for cell in self.asked.cells]
        damaged = set(self.redone) - set(self.measured)
        finished = [name for name in names if self.folder.step_file(name).is_file() and name not in damaged]
        return {
            "study": self.asked.grid.name,
            "out": str(self.folder.path),
            "cells": names,
            "finished": finished,
            "measured": self.measured,
            "elsewhere": [name for name in names if name in self.busy and name not in finished],
            "redone": self.redone,
            "failed": self.failed,
            "impossible": self.asked.impossible,
        }
