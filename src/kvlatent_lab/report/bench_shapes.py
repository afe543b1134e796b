"""What a bench looks like: times and bytes by model, cache, batch and context."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvlatent_lab.report.figures import Origin, Record, Shape
from kvlatent_lab.report.rules import Positive, Size

__all__ = ["Bench", "BenchRatio", "BenchRow", "LongestContext", "LongestContexts"]

Quartiles = Annotated[list[Size], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=1)]


class BenchRow(Shape):
    """One row of a bench: a model with a cache at a batch and a context; medians."""

    batch: Count
    context: Count
    model: str
    cache: str = "dynamic"
    prefill_s: Positive | None = None
    prefill_s_quartiles: Quartiles | None = None
    decode_ms_per_token: Positive | None = None
    decode_ms_per_token_quartiles: Quartiles | None = None
    tokens_per_s: Positive | None = None
    cache_bytes: Size | None = None
    peak_bytes: Size | None = None


class BenchRatio(Shape):
    """How many times faster than another row, and by the bytes alone; share of its bytes."""

    batch: Count
    context: Count
    cache: str = "dynamic"
    model: str = "latent"
    prefill: Positive | None = None
    decode: Positive | None = None
    decode_quartiles: Quartiles | None = None
    cache_bytes: Size | None = None
    predicted_decode: Positive | None = None


class LongestContext(Shape):
    """Longest context in a memory; None: no limit."""

    batch: Count = 1
    cache: str = "dynamic"
    model: str
    tokens: int | None = None


class LongestContexts(Shape):
    """Longest contexts of every model and cache."""

    memory_bytes: Size | None = None
    rows: list[LongestContext] = Field(default_factory=list)


class Bench(Shape):
    """`kvlatent bench`: times and bytes over batch and context; `compile` says whether the step was compiled."""

    model: Origin
    original: Origin | None = None
    device: str = ""
    dtype: str = ""
    attention: str = ""
    compile: bool | None = None
    rows: list[BenchRow] = Field(min_length=1)
    ratios: list[BenchRatio] = Field(default_factory=list)
    stacked: list[BenchRatio] = Field(default_factory=list)
    largest_context: LongestContexts | None = None
    record: Record = Record()

    @property
    def setup(self) -> str:
        """What was run on what, as far as the document says it."""
        compiled = {True: "step compiled", False: "step not compiled", None: ""}[self.compile]
        models = (self.model, self.original)
        random = "random weights" if any(one is not None and one.random_weights for one in models) else ""
        attention = f"{self.attention} attention" if self.attention else ""
        return ", ".join(part for part in (self.device, self.dtype, attention, compiled, random) if part)
