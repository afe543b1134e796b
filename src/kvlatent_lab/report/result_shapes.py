"""What result files look like: one shape a kind.

A file that does not fit its shape is no document and is skipped with the sentence that says where.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from kvlatent_lab.report.figures import Figures, Needle, Order, Origin, Record, Shape
from kvlatent_lab.report.rules import Size, check_numbers, check_signs

__all__ = [
    "Attenuation",
    "Comparison",
    "Conversion",
    "ConvertedLayer",
    "Diagnosis",
    "Earlier",
    "Evaluation",
    "Evidence",
    "Finding",
    "Made",
    "Run",
    "Step",
    "StudyCell",
    "StudyFigures",
]


class Evidence(Shape):
    """A number behind a finding, and the threshold it was held against."""

    value: float | None = None
    threshold: float | None = None
    standard_error: Size | None = None


class Finding(Shape):
    """What is wrong with a model (or "none"), the numbers behind it, what to change."""

    name: str
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    advice: str = ""


class Diagnosis(Shape):
    """What is wrong with a latent model."""

    findings: list[Finding] = Field(default_factory=list)
    not_measured: list[str] = Field(default_factory=list)
    summary: str = ""


class Evaluation(Shape):
    """`kvlatent eval`: a model, and beside it the original it came from."""

    model: Origin
    original: Origin | None = None
    figures: dict[str, Figures]
    diagnosis: Diagnosis | None = None
    record: Record = Record()

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        """What stands beside both models' figures (the ratio, the fidelity) belongs to the latent one."""
        figures = data.get("figures") if isinstance(data, dict) else None
        if not isinstance(figures, dict):
            return data
        both = {key: figures[key] for key in ("latent", "original") if figures.get(key) is not None}
        if not isinstance(both.get("latent"), dict):
            return {**data, "figures": both} if both else data
        names = ("ratio", "ratio_standard_error", "fidelity", "comparison")
        shared = {key: source[key] for source in (data, figures) for key in names if key in source}
        return {**data, "figures": {**both, "latent": {**shared, **both["latent"]}}}


class Attenuation(Shape):
    """Similarity of a vector to itself by distance: `positions`, and beside them one list a curve."""

    positions: list[float] = Field(min_length=1)
    curves: dict[str, list[float]]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "curves" in data:
            return data
        curves = {name: curve for name, curve in data.items() if name != "positions"}
        return {"positions": data.get("positions"), "curves": curves}

    @model_validator(mode="after")
    def _equal(self) -> Attenuation:
        for name, curve in self.curves.items():
            if len(curve) != len(self.positions):
                raise ValueError(f"{name} must have {len(self.positions)} numbers: got {len(curve)}")
        return self


class StudyFigures(Shape):
    """Figures of a cell: whatever the study measures. Known by name are grids, curves, and tables to draw them from."""

    attenuation: Attenuation | None = None
    inv_freq: list[float] | list[list[float]] | None = None
    order: Order | None = None
    original_order: Order | None = None
    needle: Needle | None = None
    original_needle: Needle | None = None

    @model_validator(mode="after")
    def _filled(self) -> StudyFigures:
        for table in (self.inv_freq, *(self.inv_freq or ())):
            if table == []:
                raise ValueError(
                    f"inv_freq must hold 1 frequency or more in every table: got {self.inv_freq}"
                )
        return self


class StudyCell(Shape):
    """One cell of `kvlatent study`: settings in, figures out."""

    study: str
    cell: str
    model: Origin
    settings: dict[str, Any]
    figures: dict[str, Any]
    record: Record = Record()

    @property
    def known(self) -> StudyFigures:
        """Those of the figures that have a form of their own."""
        return StudyFigures.model_validate(self.figures)

    @model_validator(mode="after")
    def _readable(self) -> StudyCell:
        check_numbers(self.figures, "figures")
        check_signs(self.figures, "figures")
        check_signs(self.settings, "settings")
        _ = self.known
        return self


class ConvertedLayer(Shape):
    """Widths of a layer, and the relative squared error of its attention output by strategy; None: impossible."""

    layer: int
    d_qk: int
    d_vo: int
    errors: dict[str, float | None] = Field(default_factory=dict)


class Made(Shape):
    """What a run says of its conversion."""

    layers: list[ConvertedLayer] = Field(default_factory=list)


class Earlier(Shape):
    """What a run says of the one that it went on from."""

    sha256: dict[str, str | None] = Field(default_factory=dict)


class Run(Shape):
    """`run.json`: how a checkpoint was made, and what it was worth after each step."""

    plan: dict[str, Any] = Field(default_factory=dict)
    sha256: dict[str, str | None] = Field(default_factory=dict)
    conversion: Made | None = None
    training: dict[str, dict[str, Any]] = Field(default_factory=dict)
    figures: dict[str, Figures] = Field(default_factory=dict)
    earlier: list[Earlier] = Field(default_factory=list)


class Step(Shape):
    """One line of `metrics.jsonl`."""

    stage: int
    tokens: Annotated[int, Field(ge=0)]
    loss: float


class Conversion(Shape):
    """`benchmarks/conversion.py`: perplexity ratios of many conversions of one model."""

    cells: dict[str, dict[str, Any]] = Field(min_length=1)
    sha256: dict[str, str | None] = Field(default_factory=dict)
    head_dim: int | None = None

    def record_of(self, name: str, shared: Record) -> Record:
        """How one of the cells came about; what it does not say itself is as in `shared`."""
        cell = self.cells[name]
        known = {key: cell[key] for key in ("command", "seed", "machine") if key in cell}
        common = {"python": shared.python, "versions": shared.versions, "machine": shared.machine}
        return Record.model_validate({**common, **known, "seconds": cell.get("conversion_seconds")})

    @model_validator(mode="after")
    def _readable(self) -> Conversion:
        check_signs(self.cells, "cells")
        for name in self.cells:
            self.record_of(name, Record())
        return self


class Comparison(Shape):
    """Named variants of one model, the original among them (`benchmarks/choices.py`, `two_stage.py`)."""

    rows: dict[str, Figures]
    sha256: dict[str, str | None] = Field(default_factory=dict)
