"""The document of one cell of `kvlatent study`: settings in, figures out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from kvlatent.evaluation.result_models import Count, ModelIdentity, Needle, Positive, Size, WordOrder
from kvlatent.jobs.record import Provenance, Result

__all__ = ["Attenuation", "StudyCell", "StudyFigures", "flat", "numeric"]

Setting = bool | int | float | str | None


class Attenuation(Result):
    """Similarity of a vector to itself by distance in tokens, of the original's rotary tables and of the latent ones."""

    positions: list[float] = Field(min_length=1)
    original: list[float]
    latent: list[float]

    @model_validator(mode="after")
    def _equally_long(self) -> Attenuation:
        for name in ("original", "latent"):
            if len(getattr(self, name)) != len(self.positions):
                raise ValueError(
                    f"{name} must have {len(self.positions)} numbers: got {len(getattr(self, name))}"
                )
        return self


class StudyFigures(Result):
    """What a study measured: whatever numbers it likes, nested or in lists; these are known by name."""

    perplexity: Positive | None = None
    standard_error: Size | None = None
    ratio: Positive | None = None
    ratio_standard_error: Size | None = None
    original_perplexity: Positive | None = None
    tokens: Size | None = None
    cache_ratio: Positive | None = None
    attenuation: Attenuation | None = None
    order: WordOrder | None = None
    original_order: WordOrder | None = None
    needle: Needle | None = None
    original_needle: Needle | None = None

    @model_validator(mode="after")
    def _finite(self) -> StudyFigures:
        for name, value in (self.model_extra or {}).items():
            if not numeric(value):
                raise ValueError(
                    f"{name} must be a finite number, or a list or map of some: got {value!r:.40}"
                )
        return self


class StudySettings(Result):
    """What a cell was asked for; a study adds what it varies, a word or a number each."""

    __pydantic_extra__: dict[str, Setting]  # ty: ignore[incompatible-mutable-override]

    preset: str | None = None
    d_qk: Count | None = None
    d_vo: Count | None = None
    seed: int | None = None
    stage1_tokens: Count = 0
    stage2_tokens: Count = 0

    @property
    def tokens(self) -> int:
        """Of training, both stages together."""
        return self.stage1_tokens + self.stage2_tokens


class StudyCell(Result):
    """One cell: a model under some settings. One that could not be measured has no figures and says why in `record`."""

    kind: Literal["study"]
    study: str
    cell: str
    model: ModelIdentity
    settings: StudySettings
    figures: StudyFigures
    record: Provenance


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; lists are kept as they are."""
    flattened: dict[str, Any] = {}
    for key, part in value.items():
        flattened |= flat(part, f"{prefix}{key}.") if isinstance(part, Mapping) else {f"{prefix}{key}": part}
    return flattened


def numeric(figures: Any) -> bool:
    """Whether there are finite numbers only, in nested mappings and lists."""
    if isinstance(figures, Mapping):
        return all(isinstance(key, str) and numeric(value) for key, value in figures.items())
    if isinstance(figures, list):
        return all(numeric(value) for value in figures)
    return isinstance(figures, int | float) and not isinstance(figures, bool) and math.isfinite(figures)
