"""The documents of `kvlatent eval` and `kvlatent bench`: one model each, for the commands that write and all who read.

A field is None where it was not measured, or where the document is of a version that did not measure it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, model_validator

from kvlatent.jobs.record import Provenance, Result
from kvlatent.model.config import LatentConfig

__all__ = [
    "Bench",
    "BenchRatio",
    "BenchRow",
    "Diagnosis",
    "Evaluation",
    "Fidelity",
    "Figures",
    "LongestContexts",
    "ModelIdentity",
    "Needle",
    "Recall",
    "WordOrder",
]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[float, Field(ge=0)]
Grid = list[list[float]]
Errors = list[list[Size | None]]
Quartiles = tuple[Size, Size]


def _config(value: Any) -> LatentConfig:
    """`kv_latent` of a config.json as `LatentConfig`; raises `ValueError` where it is damaged."""
    try:
        config = value if isinstance(value, LatentConfig) else LatentConfig.from_dict(value)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"latent is no config of a latent model: {error}") from error
    if not all(table.short for layer in config.tables for table in layer):
        raise ValueError("a rotary table of latent has 1 frequency or more: got 0")
    return config


Latent = Annotated[
    InstanceOf[LatentConfig], BeforeValidator(_config), PlainSerializer(lambda config: config.to_dict())
]


class ModelIdentity(Result):
    """A model by name and by the SHA-256 of its weights; `latent` is its `kv_latent`, if it has one.

    With `random_weights`, `name` is that of a shape. A bench adds the bytes and the widths of every layer.
    """

    name: str | None = None
    fingerprint: str | None = None
    latent: Latent | None = None
    random_weights: bool = False
    weight_bytes: Size | None = None
    read_bytes: Size | None = None
    d_qk: list[int] | None = None
    d_vo: list[int] | None = None
    group_sizes: dict[str, int] = Field(default_factory=dict)


class Needle(Result):
    """Needle in a haystack: rows are contexts (tokens), columns depths (0 is the start of the text)."""

    contexts: list[int] = Field(min_length=1)
    depths: list[float] = Field(min_length=1)
    exact: Grid
    rank: Grid
    trial_exact: list[float] = Field(default_factory=list)
    trial_rank: list[float] = Field(default_factory=list)
    trials: Count | None = None
    needle_tokens: Count | None = None
    cue_tokens: Count | None = None
    template: str | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> Needle:
        _check_grids(self, ("exact", "rank"), len(self.contexts), len(self.depths))
        return self


class WordOrder(Result):
    """Log-likelihood of the true order of a span over a permuted one: rows are spans (tokens), columns depths.

    `margin` is in nats; `preferred` the share of permutations that are less likely; `after_` of what follows the span.
    """

    spans: list[int] = Field(min_length=1)
    depths: list[float] = Field(min_length=1)
    margin: Grid
    margin_standard_error: Errors | None = None
    preferred: Grid
    preferred_standard_error: Errors | None = None
    after_margin: Grid | None = None
    after_margin_standard_error: Errors | None = None
    after_preferred: Grid | None = None
    after_preferred_standard_error: Errors | None = None
    trial_margin: Grid = Field(default_factory=list)
    trial_after_margin: Grid = Field(default_factory=list)
    trials: Count | None = None
    permutations: Count | None = None
    length: Count | None = None
    after: Count | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> WordOrder:
        scores = ("margin", "preferred", "after_margin", "after_preferred")
        names = [f"{score}{ending}" for score in scores for ending in ("", "_standard_error")]
        _check_grids(self, names, len(self.spans), len(self.depths))
        return self


def _check_grids(measured: Needle | WordOrder, names: Any, rows: int, columns: int) -> None:
    """Raise `ValueError` where a grid is not as its axes say."""
    for name in names:
        grid = getattr(measured, name)
        if grid is not None and [len(row) for row in grid] != [columns] * rows:
            raise ValueError(f"{name} must have {rows} rows of {columns}: got {[len(row) for row in grid]}")


class LayerFidelity(Result):
    """One layer of the latent model beside the original's; entropies in nats, uniformity between 0 and 1."""

    layer: int
    relative_error: float | None = None
    attention_kl: float | None = None
    entropy_original: float | None = None
    entropy_latent: float | None = None
    entropy_ratio: float | None = None
    uniformity_original: float | None = None
    uniformity_latent: float | None = None


class Fidelity(Result):
    """Distance of the latent model's predictions from the original's, nats a token."""

    kl: float
    kl_standard_error: Size | None = None
    top1_agreement: float
    tokens: Count | None = None
    layers: list[LayerFidelity] = Field(default_factory=list)


class Tasks(Result):
    """What lm-eval measured: for each task its metrics, and `<metric>_stderr` beside those that have one."""

    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Recall(Result):
    """Copying of random strings, by `distances` (tokens): of all, the share `copied`; `hits` are tokens by sequence.

    `kept` is the share of what the original copies, None where that is next to nothing.
    """

    copied: Annotated[float, Field(ge=0, le=1)]
    distances: list[int] = Field(min_length=1)
    trials: Count | None = None
    hits: list[Count] = Field(default_factory=list)
    kept: Size | None = None
    kept_standard_error: Size | None = None


class Figures(Result):
    """What was measured of one model; the ratio, in a run, is that of its perplexity over the original's."""

    perplexity: Positive | None = None
    standard_error: Size | None = None
    loss: float | None = None
    tokens: Count | None = None
    bytes: Count | None = None
    bits_per_byte: Size | None = None
    documents: Count | None = None
    window: Count | None = None
    stride: Count | None = None
    cache_bytes_per_token: Size | None = None
    cache_dtype: str | None = None
    ratio: Positive | None = None
    ratio_standard_error: Size | None = None
    recall: Recall | None = None
    needle: Needle | None = None
    order: WordOrder | None = None
    causality: float | None = None
    tasks: Tasks = Tasks()


class BothFigures(Result):
    """Figures of each model, and what compares them."""

    latent: Figures
    original: Figures | None = None
    ratio: Positive | None = None
    ratio_standard_error: Size | None = None
    cache_ratio: Positive | None = None
    fidelity: Fidelity | None = None
    tasks: Tasks = Tasks()


class Evidence(Result):
    """A number behind a finding, the threshold it was held against, and what it is made of."""

    value: float | None = None
    threshold: float | None = None
    standard_error: Size | None = None
    original: float | None = None
    latent: float | None = None
    layer: int | None = None
    layers: list[int] | None = None


class Finding(Result):
    """What is wrong with a model (or "none"), the numbers behind it, what to change."""

    name: str
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    advice: str = ""


class Diagnosis(Result):
    """What `diagnose` says."""

    findings: list[Finding] = Field(default_factory=list)
    not_measured: list[str] = Field(default_factory=list)
    summary: str = ""


class Evaluation(Result):
    """`kvlatent eval`: a model ("latent" in the figures, whatever it is), and beside it the original it came from."""

    kind: Literal["evaluation"]
    model: ModelIdentity
    original: ModelIdentity | None = None
    figures: BothFigures
    diagnosis: Diagnosis | None = None
    record: Provenance = Provenance()


class _Place(Result):
    """Sequences at once, tokens of the prompt, kind of cache."""

    batch: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=1)]
    cache: str


class BenchRow(_Place):
    """One row of a bench: medians of one model over rounds, bytes of the caches of all sequences."""

    model: str
    prefill_s: Positive
    prefill_s_quartiles: Quartiles
    decode_ms_per_token: Positive
    decode_ms_per_token_quartiles: Quartiles
    tokens_per_s: Positive
    cache_bytes: Size
    last_cache_bytes: Size
    peak_bytes: Size | None = None
    bound_ms_per_token: Positive | None = None


class BenchRatio(_Place):
    """How many times faster than another row, measured and by the bytes alone; share of its bytes."""

    model: str = "latent"
    prefill: Positive
    prefill_quartiles: Quartiles
    decode: Positive
    decode_quartiles: Quartiles
    cache_bytes: Size
    predicted_decode: Positive


class LongestContext(Result):
    """Longest context in a memory; None: no limit."""

    batch: int
    cache: str
    model: str
    tokens: int | None = None


class LongestContexts(Result):
    """Longest contexts of every model and cache."""

    memory_bytes: Size
    rows: list[LongestContext] = Field(default_factory=list)


class OutOfMemory(_Place):
    """What a bench could not measure."""

    model: str
    reason: str


class BenchSettings(Result):
    """What was asked of a bench, by hand or by default."""

    batches: list[int]
    contexts: list[int]
    caches: list[str]
    new_tokens: int
    repeats: int


class Bench(Result):
    """`kvlatent bench`: times and bytes over batch and context; `compile` says whether the step was compiled.

    `engine` is who ran it; None: our own runtime. Caches are then types of the engine's.
    """

    kind: Literal["bench"]
    engine: str | None = None
    read_bytes_per_s: Positive | None = None
    model: ModelIdentity
    original: ModelIdentity | None = None
    device: str
    dtype: str
    attention: str
    compile: bool
    peak_memory: str
    rows: list[BenchRow] = Field(min_length=1)
    ratios: list[BenchRatio] = Field(default_factory=list)
    stacked: list[BenchRatio] = Field(default_factory=list)
    largest_context: LongestContexts | None = None
    skipped: list[OutOfMemory] = Field(default_factory=list)
    settings: BenchSettings
    record: Provenance
