"""What narrow caches were measured to cost: of which model, at which widths, in which KV dtype.

The figures are those of the committed tables of real models, collected by `benchmarks/measured_losses.py`. They are a
model's own. Another model at the same share of its width may lose more or less, so whoever shows one names its model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from kvlatent.engines.kv_dtypes import KVDtype

__all__ = ["MeasuredLoss", "measured_at", "measured_losses", "most_loss"]


@dataclass(frozen=True)
class MeasuredLoss:
    """One converted model against its original.

    Args:
        row: of the table of `model`; a word behind it names the machine of another table of the same model.
        model: that was converted, by the name of its table.
        head_dim, d_qk, d_vo: its head width, and the widths that were kept, channels.
        table: scope of the rotary table.
        engine, kv_dtype: that it ran on, and the type of the cache there.
        tokens_trained: after the conversion; 0 for none.
        text: that was measured on.
        kl, kl_standard_error: divergence of the next token from the original's, nats a token.
        perplexity_ratio: of the original's.
    """

    row: str
    model: str
    head_dim: int
    d_qk: int
    d_vo: int
    table: str
    engine: str
    kv_dtype: str
    tokens_trained: int
    text: str
    kl: float
    kl_standard_error: float
    perplexity_ratio: float

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@cache
def measured_losses() -> tuple[MeasuredLoss, ...]:
    """All of them, the least divergence first."""
    text = files("kvlatent.engines").joinpath("measured_losses.json").read_text(encoding="utf-8")
    return tuple(sorted((MeasuredLoss(**row) for row in json.loads(text)), key=lambda loss: loss.kl))


def measured_at(
    d_qk: int, d_vo: int, head_dim: int, table: str, kv_dtype: KVDtype
) -> tuple[MeasuredLoss, ...]:
    """What was measured at the same share of keys and of values, with a table of this scope, in this KV dtype.

    All types without loss are one here: 16 bits and more.
    """
    return tuple(
        loss
        for loss in _comparable(table, kv_dtype)
        if (loss.d_qk * head_dim, loss.d_vo * head_dim) == (d_qk * loss.head_dim, d_vo * loss.head_dim)
    )


def most_loss(d_qk: int, d_vo: int, head_dim: int, table: str, kv_dtype: KVDtype) -> float | None:
    """The most that these widths should cost, untrained, by what was measured of narrower ones; None for no bound.

    0 for the whole width in 16 bits. Otherwise the divergence of the widest conversion that keeps no more of keys and of
    values: wider ones lose less. It orders plans, and is not a figure of the model that is planned.
    """
    if d_qk == d_vo == head_dim and kv_dtype.is_lossless:
        return 0.0
    narrower = [
        loss.kl
        for loss in _comparable(table, kv_dtype)
        if not loss.tokens_trained
        and loss.d_qk * head_dim <= d_qk * loss.head_dim
        and loss.d_vo * head_dim <= d_vo * loss.head_dim
    ]
    return min(narrower, default=None)


def _comparable(table: str, kv_dtype: KVDtype) -> list[MeasuredLoss]:
    return [
        loss
        for loss in measured_losses()
        if (loss.table == table or loss.d_qk == loss.head_dim)  # whole keys turn as the original's do
        and (loss.kv_dtype == kv_dtype.name or (kv_dtype.is_lossless and loss.kv_dtype in _LOSSLESS))
    ]


_LOSSLESS = ("bfloat16", "float16", "float32", "f16", "f32")
