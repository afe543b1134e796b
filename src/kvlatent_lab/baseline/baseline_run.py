"""Making the baseline tables: one JSON file a row, written whole, claimed by one process at a time.

A row that was measured before a set of questions was there gets the columns that it lacks. Conversions, statistics and
unfinished training lie in a work folder, so that rows share them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.evaluation.perplexity import perplexity
from kvlatent.evaluation.speed.caches import check_caches
from kvlatent.jobs.atomic import write_text
from kvlatent.jobs.devices import precision
from kvlatent.jobs.fingerprints import differences, fingerprint, identity
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment, name_for_record
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import head_dim_of
from kvlatent_lab.baseline.cache_reading import read_through_cache
from kvlatent_lab.baseline.columns import TEXTS, Columns, Sizes
from kvlatent_lab.baseline.table_rows import NEW, Steps, TableRow, table_rows
from kvlatent_lab.study.folder import StudyFolder
from kvlatent_lab.study.grid_cells import Cell
from kvlatent_lab.study.measure_cell import (
    collect_cell_statistics,
    convert_cell,
    forget,
    name_conversion,
    name_text,
    train_cell,
)
from kvlatent_lab.study.subject import Source, Subject

__all__ = ["RATES", "Baseline", "Request", "pick_rows"]

RATES = (1e-4, 3e-4, 1e-3)
_CHOOSING_TOKENS = 8192  # held out from the text to train on, which rates are chosen by
_POOL_TOKENS = (
    1_000_000  # of training fit into the text that calibration blocks are drawn from, the same in all rows
)


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        model: the original; texts, tasks: folders, see `columns`.
        out: of the rows; work: of what is made on the way.
        sizes: of the measurements; recipe: of calibration, conversion and training; steps: of rows "passed".
        dtype: of the products while models are measured; their weights are fp32.
        pilot_tokens: that every rate is tried with before one is chosen.
        rate: of training; None chooses among `RATES`.
        device: "cpu" or "cuda".
    """

    model: str | Path
    texts: Path
    tasks: Path
    out: Path
    work: Path
    sizes: Sizes
    recipe: Recipe
    steps: Steps
    dtype: str = "float32"
    pilot_tokens: int = 32_768
    rate: float | None = None
    device: str = "cpu"

    def decides(self) -> dict[str, Any]:
        """Everything that decides the figures, but for the sets of questions, which may come later."""
        texts = {
            name: identity(self.texts / file) for name, file in TEXTS.items() if (self.texts / file).is_file()
        }
        return {
            "model": identity(self.model),
            "train": identity(self.train),
            "texts": texts,
            "sizes": asdict(self.sizes),
            "recipe": self.recipe.model_dump(mode="json"),
            "dtype": self.dtype,
        }

    def settings_of(self, row: TableRow) -> dict[str, Any]:
        """What decides a row beside that: its own, and how the rate of its training is found."""
        trained = row.cell is not None and row.cell.stage2
        return row.settings | ({"rate": self.rate or [*RATES, self.pilot_tokens]} if trained else {})

    @property
    def train(self) -> Path:
        """The text of calibration and training."""
        return self.texts / "fineweb_train.jsonl"


def pick_rows(rows: list[TableRow], pattern: str | None) -> list[TableRow]:
    """Rows whose name matches a shell pattern, or one of several separated by commas.

    Raises:
        ValueError: none does.
    """
    if pattern is None:
        return rows
    found = [row for row in rows if any(fnmatch(row.name, one) for one in pattern.split(","))]
    if not found:
        raise ValueError(f"--only matches none of {len(rows)} rows: got {pattern!r}; see --list")
    return found


class Baseline:
    """The tables of one model in the making.

    Args:
        request: what is asked for.
        progress: told of every step.
    """

    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress = request, progress
        inputs = {"model": request.model, "texts": request.texts, "tasks": request.tasks}
        decides = request.decides()
        self.folder = StudyFolder(request.out, "real-tables", decides, inputs)
        made_of = {name: decides[name] for name in ("model", "train", "recipe")}
        self.folder.work = request.work.absolute() / fingerprint(made_of)[:12]
        self.folder.join()
        source = Source(request.model, name_for_record(request.model), request.train, None)
        self.subject = Subject(
            source, self.folder, request.recipe,
            eval_tokens=_CHOOSING_TOKENS, tokens=_POOL_TOKENS, device=request.device,
        )  # fmt: skip
        model = self.subject.model
        self.columns = Columns(
            self.subject.tokenizer,
            model.config,
            request.texts,
            request.tasks,
            self.folder.work,
            request.sizes,
        )
        self.measures = self.columns.measures(self._original_states)
        self.rows = table_rows(head_dim_of(model.config), request.recipe.seed, request.steps)

    def until_done(self, pattern: str | None = None) -> list[str]:
        """Measure every row that is not finished and that no other process is at; returns the names of those measured.

        Raises:
            ValueError: rows of a global pass are asked for with no steps of it, or a finished row is of other settings.
        """
        measured: list[str] = []
        rows = [row for row in pick_rows(self.rows, pattern) if self._has_cache(row)]
        self._check_settings(rows)
        while todo := [row for row in rows if self._lacks(row)]:
            before = len(measured)
            for row in todo:
                with self.folder.claim(row.name) as mine:
                    if mine and self._lacks(row):
                        self._measure(row)
                        measured.append(row.name)
            if len(measured) == before:
                break
        return measured

    def _has_cache(self, row: TableRow) -> bool:
        """Whether the row's cache works here; says why not, and leaves the row to a call that has the package."""
        try:
            check_caches([row.cache], [self.subject.model.config], self.subject.model.device)
        except ValueError as error:
            self.progress.report(f"{row.name} left out: {error}")
            return False
        return True

    def _check_settings(self, rows: list[TableRow]) -> None:
        passed = [row.name for row in rows if f"-{NEW}-" in row.name]
        steps = self.request.steps
        if passed and min(steps) < 1:
            raise ValueError(
                f"rows {NEW} are aligned and take the global pass, 1 step of each or more: got --align {steps.align} "
                f"--global-steps {steps.global_steps} for {passed[0]}; give --global-steps 100, or other rows with --only"
            )
        for row in rows:
            told = (self.folder.done(row.name) or {}).get("settings", {})
            # A file is silent about what was no option yet when it was made.
            settings = self.request.settings_of(row)
            changed = differences(told, {name: settings.get(name) for name in told})
            if changed:
                raise ValueError(
                    f"{self.folder.step_file(row.name)} is of another {', '.join(changed)}; call it with the same "
                    "arguments, delete it to measure it again, or give another --out"
                )

    def _lacks(self, row: TableRow) -> list[str]:
        """Columns that are still to be measured; none of a row that cannot be."""
        found = self.folder.done(row.name)
        if found is None:
            return ["cache", *self.measures]
        if "failed" in found["record"]:
            return []
        return [name for name in self.measures if name not in found["figures"]]

    def _measure(self, row: TableRow) -> None:
        """Measure the columns that a row lacks, and write it."""
        told = self.progress.within(row.name)
        old = self.folder.done(row.name) or {"figures": {}, "seconds": {}, "record": {}}
        figures, seconds = dict(old["figures"]), dict(old["seconds"])
        failed = {}
        try:
            model, made = self._model(row, told)
            seconds |= made.pop("seconds")
            figures |= made
            for name in self._lacks(row):
                told.report(name)
                start = time.monotonic()
                figures[name] = self._column(name, model, row.cache)
                seconds[name] = round(time.monotonic() - start, 2)
        except ValueError as error:
            failed = {"failed": str(error).replace(f"{self.folder.work}/", "")}
        record = {
            **environment(self.request.device),
            "commit": _commit(),
            "seed": self.request.recipe.seed,
            "dtype": self.request.dtype,
            **failed,
        }
        document = {
            "kind": "real-tables",
            "row": row.name,
            "model": self.subject.source.name,
            "settings": self.request.settings_of(row),
            "figures": figures,
            "seconds": seconds,
            "record": record,
        }
        write_text(self.folder.step_file(row.name), json.dumps(document) + "\n")
        if (
            row.cell is not None and "training" in figures
        ):  # the trained weights stay, for columns that are still to come
            name = _trained_at(row.cell, figures["training"]["learning_rate"])
            for checkpoint in (self.folder.work / "training" / name).glob("stage*/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _column(self, name: str, model: PreTrainedModel, cache: str) -> dict[str, Any]:
        if name == "cache":
            return self.columns.cache(model, cache)
        with precision(self.request.device, self.request.dtype), read_through_cache(model, cache):
            return self.measures[name](model)

    def _model(self, row: TableRow, told: Progress) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model of a row, and what its making took and chose."""
        if row.cell is None:
            return self.subject.model, {"seconds": {}}
        cell, made = row.cell, self._made(row.cell, told)
        if not cell.stage2:
            model = convert_cell(self.subject, cell, told)
        else:
            rate = self.request.rate or self._rate(cell, told)
            recipe = {**cell.recipe, "stage2.learning_rate": rate}
            cell = replace(cell, name=_trained_at(cell, rate), recipe=recipe)
            model, trained = train_cell(self.subject.with_room_for(cell.stage2), cell, told)
            made["seconds"]["training"] = trained["training_seconds"]
            made["training"] = trained | {"learning_rate": rate}
        made["widths"] = latent_config_of(model.config).widths._asdict()
        return model.requires_grad_(False).eval(), made

    def _made(self, cell: Cell, told: Progress) -> dict[str, Any]:
        """Seconds that the calibration and the conversion of a cell took when they were made."""
        seconds = {}

        def timed(name: str, make: Callable[[], Any]) -> float:
            def compute() -> float:
                start = time.monotonic()
                make()
                return round(time.monotonic() - start, 2)

            return self.subject.remembered(f"seconds-{name}", compute)

        if cell.preset == "calibrated":
            seconds["calibration"] = timed(
                f"statistics-{name_text(self.subject, cell)}",
                lambda: collect_cell_statistics(self.subject, cell, told),
            )
        name = name_conversion(self.subject, replace(cell, stage2=0))
        seconds["conversion"] = timed(name, lambda: convert_cell(self.subject, cell, told))
        return {"seconds": seconds}

    def _rate(self, cell: Cell, told: Progress) -> float:
        """The rate with the least loss on text held out from that of training, of short runs from the same conversion."""

        def compute() -> dict[str, float]:
            losses = {}
            for rate in RATES:
                name = f"pilot-{name_conversion(self.subject, cell)}-{rate:g}"
                recipe = {**cell.recipe, "stage2.learning_rate": rate}
                pilot = replace(cell, name=name, stage2=self.request.pilot_tokens, recipe=recipe)
                model, _ = train_cell(self.subject, pilot, told.within(f"rate {rate:g}"))
                losses[f"{rate:g}"] = perplexity(model, self.subject.blocks()).loss
                forget(self.subject, pilot)
            return losses

        losses = self.subject.remembered(f"rates-{name_conversion(self.subject, cell)}", compute)
        return float(min(losses, key=losses.__getitem__))

    def _original_states(self) -> Path:
        """What the original's head reads, measured once for a dtype and a number of blocks."""
        sizes = self.request.sizes
        name = f"states-{self.request.dtype}-{sizes.blocks}x{sizes.block_size}.safetensors"

        def write(path: Path) -> None:
            with precision(self.request.device, self.request.dtype):
                self.columns.write_states(self.subject.model, path)

        return self.folder.shared_file(name, write)


def _trained_at(cell: Cell, rate: float) -> str:
    """The name that training at a rate lies under, so that another rate does not find it."""
    return f"{cell.name}-{rate:g}"


def _commit() -> str | None:
    """The commit of the code, where it is a checkout, with a plus behind it where files have changed."""
    here = Path(__file__).parent
    try:
        told = [
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + ("+" if told[1] else "")
