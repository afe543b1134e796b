"""The documents of the scripts in `benchmarks/` that the report draws: many conversions of one model, named variants."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvlatent.evaluation.result_models import Positive, Size
from kvlatent.jobs.record import Provenance, Result

__all__ = ["Comparison", "ConversionBenchmark", "ConversionCell"]


class ConversionCell(Result):
    """One conversion: widths (a list: of every layer), perplexity over the original's, and how it came about."""

    command: str | None = None
    seed: int | None = None
    machine: dict[str, str | int | float | None] = Field(default_factory=dict)
    d_qk: int | list[int] | None = None
    d_vo: int | list[int] | None = None
    ratio: Positive | None = None
    ratio_standard_error: Size | None = None
    perplexity: Positive | None = None
    original_perplexity: Positive | None = None
    tokens: Size | None = None
    conversion_seconds: Size | None = None


class ConversionBenchmark(Provenance):
    """`benchmarks/conversion.py`: cells by a name that says method, widths and seed."""

    cells: dict[str, ConversionCell] = Field(min_length=1)
    sha256: dict[str, str | None] = Field(default_factory=dict)


class ConversionVariant(Result):
    """A variant of the model, or the original."""

    perplexity: Positive
    standard_error: Size | None = None
    ratio: Positive | None = None
    ratio_standard_error: Size | None = None


class Comparison(Provenance):
    """Named variants of one model, the original among them (`benchmarks/choices.py`, `two_stage.py`)."""

    rows: dict[str, ConversionVariant]
    sha256: dict[str, str | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_original(self) -> Comparison:
        if "original" not in self.rows:
            raise ValueError("rows must hold the original: got none")
        return self
