"""What was measured of one language model, as the results hold it.

Figures come either flat or grouped by the measurement ("perplexity": {"perplexity": ...}); both are read, and are flat
afterwards. Fields that a report does not read are kept as they are; numbers are finite.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvlatent.model.config import LatentConfig
from kvlatent_lab.report.rules import Positive, Size, check_signs

__all__ = ["Fidelity", "Figures", "Layer", "Needle", "Order", "Origin", "Reading", "Record", "Shape"]

Grid = list[list[float]]


class Shape(BaseModel):
    """Base of every shape: numbers are finite, fields nobody asked for are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Origin(Shape):
    """A model by name and by the SHA-256 of its weights; `latent` is its `kv_latent`, if it has one.

    With `random_weights`, `name` is that of a shape.
    """

    name: str | None = None
    fingerprint: str | None = None
    latent: dict[str, Any] | None = None
    random_weights: bool = False

    @cached_property
    def config(self) -> LatentConfig | None:
        """Widths and tables of a latent model; raises `ValueError` where they are damaged."""
        if self.latent is None:
            return None
        try:
            config = LatentConfig.from_dict(self.latent)
        except (AttributeError, TypeError, LookupError) as error:
            raise ValueError(f"latent is no config of a latent model: {error}") from error
        if not all(table.short for layer in config.tables for table in layer):
            raise ValueError("a rotary table of latent has 1 frequency or more: got 0")
        return config

    @model_validator(mode="after")
    def _readable(self) -> Origin:
        _ = self.config
        return self


class Reading(Shape):
    """A text that was read, by its last name and SHA-256."""

    name: str | None = None
    sha256: str | None = None


class Record(Shape):
    """How a figure came about: command, seed, seconds, text, versions, machine; or why it could not."""

    command: str | None = None
    seed: int | None = None
    seconds: float | None = None
    failed: str | None = None
    text: Reading | None = None
    python: str | None = None
    versions: dict[str, str | None] = Field(default_factory=dict)
    machine: dict[str, str | int | float | None] = Field(default_factory=dict)


class Needle(Shape):
    """Needle in a haystack: rows are contexts (tokens), columns depths (0 is the start of the text)."""

    contexts: list[int] = Field(min_length=1)
    depths: list[float] = Field(min_length=1)
    exact: Grid
    rank: Grid | None = None
    trials: int | None = None

    @model_validator(mode="after")
    def _square(self) -> Needle:
        _check_grid("exact", self.exact, len(self.contexts), len(self.depths))
        _check_grid("rank", self.rank, len(self.contexts), len(self.depths))
        return self


class Order(Shape):
    """Positional sensitivity: rows are spans (tokens), columns depths."""

    spans: list[int] = Field(min_length=1)
    depths: list[float] = Field(min_length=1)
    margin: Grid
    margin_standard_error: list[list[Size | None]] | None = None
    after_margin: Grid | None = None
    after_margin_standard_error: list[list[Size | None]] | None = None
    preferred: Grid | None = None
    trials: int | None = None

    @model_validator(mode="after")
    def _square(self) -> Order:
        for name in (
            "margin",
            "margin_standard_error",
            "after_margin",
            "after_margin_standard_error",
            "preferred",
        ):
            _check_grid(name, getattr(self, name), len(self.spans), len(self.depths))
        return self


def _check_grid(name: str, grid: list[list[Any]] | None, rows: int, columns: int) -> None:
    if grid is not None and [len(row) for row in grid] != [columns] * rows:
        raise ValueError(f"{name} must have {rows} rows of {columns}: got {[len(row) for row in grid]}")


class Layer(Shape):
    """One layer of the latent model beside the original's."""

    layer: int
    relative_error: float | None = None
    attention_kl: float | None = None
    entropy_ratio: float | None = None


class Fidelity(Shape):
    """Distance of the latent model's predictions from the original's, nats a token."""

    kl: float | None = None
    kl_standard_error: Size | None = None
    top1_agreement: float | None = None
    layers: list[Layer] = Field(default_factory=list)


class Figures(Shape):
    """What was measured of one model; groups of figures ("perplexity", "cache") are lifted to this level."""

    perplexity: Positive | None = None
    standard_error: Size | None = None
    tokens: int | None = Field(None, ge=0)
    window: int | None = None
    stride: int | None = None
    bits_per_byte: Size | None = None
    cache_bytes_per_token: Size | None = None
    ratio: Positive | None = None
    ratio_standard_error: Size | None = None
    causality: float | None = None
    fidelity: Fidelity | None = None
    needle: Needle | None = None
    order: Order | None = None
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        flat = {key: value for key, value in data.items() if value is not None}
        for group in ("perplexity", "cache", "comparison"):
            if isinstance(flat.get(group), dict):
                flat = {**{key: v for key, v in flat.items() if key != group}, **flat[group]}
        tasks = flat.get("tasks")
        if isinstance(tasks, dict) and isinstance(tasks.get("tasks"), dict):
            flat["tasks"] = tasks["tasks"]
        if "fidelity" not in flat and ("kl" in flat or "top1_agreement" in flat):
            flat["fidelity"] = {key: flat[key] for key in Fidelity.model_fields if key in flat}
        return flat

    @model_validator(mode="after")
    def _signs(self) -> Figures:
        check_signs(self.tasks, "tasks")
        return self
