"""`run.json` and `metrics.jsonl`: how a checkpoint was made, and what it was worth after each step.

Written by convert, compress and train; read by the report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from kvlatent.evaluation.result_models import Figures
from kvlatent.jobs.atomic import read_json
from kvlatent.jobs.fingerprints import fingerprint
from kvlatent.jobs.record import Provenance, Result, complaint
from kvlatent.jobs.work_directory import WorkDirectory

__all__ = ["RunRecord", "TrainingStep", "finished_record", "read_record"]


class ConvertedLayer(Result):
    """Widths of a layer, and the relative squared error of its attention output by strategy; None: impossible."""

    layer: int
    d_qk: int
    d_vo: int
    errors: dict[str, float | None] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)


class ConversionFigures(Result):
    """Seconds of a conversion, and what calibration predicted; `scope_errors` by who shares a rotary table.

    `tuned` says what a streamed conversion measured of every layer before and after it was tuned.
    """

    seconds: float | None = None
    layers: list[ConvertedLayer] = Field(default_factory=list)
    scope_errors: dict[str, float] = Field(default_factory=dict)
    predicted: dict[str, Any] | None = None
    tuned: list[dict[str, Any]] = Field(default_factory=list)


class StageSummary(Result):
    """What a stage took, and its first and last losses (stage I: those of every layer as well)."""

    stage: int | None = None
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    tokens_per_second: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    first_layer_losses: list[float] | None = None
    layer_losses: list[float] | None = None
    changes: list[str] = Field(default_factory=list)


class EarlierRun(Result):
    """What a run says of the one that it went on from."""

    command: str | None = None
    sha256: dict[str, str | None] = Field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    conversion: ConversionFigures | None = None
    training: dict[str, StageSummary] = Field(default_factory=dict)
    figures: dict[str, Figures] = Field(default_factory=dict)


class StepMinutes(Result):
    """A step of a run with a budget: what it took, and the divergence from the original in nats around it."""

    step: str
    minutes: float
    steps: int | None = None
    before: float | None = None
    after: float | None = None


class BudgetRecord(Result):
    """Minutes asked for and spent, why they were split so, and the steps, in order."""

    asked: float
    spent: float
    why: str
    steps: list[StepMinutes] = Field(default_factory=list)


class RunRecord(Provenance):
    """`run.json`; the first of `earlier` is the conversion, where a later stage was trained on its result.

    `weights` says where the original's came from if not from a checkpoint of floats ("dequantised from m.gguf (Q4_1)").
    `figures` are those of "original", "converted", "stage1" and "latent", `training` those of "stage1" and "stage2".
    `warnings` say why users would not want the result, as far as it was measured.
    """

    fingerprint: str | None = None
    plan: dict[str, Any] = Field(default_factory=dict)
    source: dict[str, Any] | None = None
    weights: str | None = None
    sha256: dict[str, str | None] = Field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    conversion: ConversionFigures | None = None
    training: dict[str, StageSummary] = Field(default_factory=dict)
    figures: dict[str, Figures] = Field(default_factory=dict)
    minutes: BudgetRecord | None = None
    warnings: list[str] = Field(default_factory=list)
    earlier: list[EarlierRun] = Field(default_factory=list)


class TrainingStep(Result):
    """One line of `metrics.jsonl`: the mean loss since the line before."""

    stage: int
    step: int | None = None
    tokens: Annotated[int, Field(ge=0)]
    seconds: float | None = None
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None


def read_record(path: Path) -> dict[str, Any] | None:
    """What a run wrote as run.json, or None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    record = read_json(path, "remove it or restore it")
    if not isinstance(record, dict):
        raise ValueError(  # noqa: TRY004 - the command line shows ValueError as one sentence
            f"{path} is not the record of a run: it holds a {type(record).__name__}; remove it or restore it"
        )
    try:
        return RunRecord.checked(record)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged ({complaint(error)}); remove it or restore it") from error


def finished_record(out: Path, workspace: WorkDirectory) -> dict[str, Any] | None:
    """The record of a run that was killed after its output appeared and before its workspace went, which then goes."""
    try:
        record = read_record(out / "run.json") if workspace.is_ours() else None
    except ValueError:  # damaged, so `out` is not that run's
        return None
    if record is None or record.get("fingerprint") != fingerprint(workspace.plan):
        return None
    workspace.remove()
    return record
