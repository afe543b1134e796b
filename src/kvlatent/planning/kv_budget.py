"""Which widths in which KV dtype fit a cache of so many bytes: for every dtype and every eighth of the width, the best.

A wider cache in fewer bits and a narrower one in more can cost the same bytes; what each loses is measured apart. So the
answer is a list: first what is known of the whole pair, by loss, then the pairs whose KV dtype nobody measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvlatent.engines.kv_dtypes import KVDtype
from kvlatent.engines.measured_losses import MeasuredLoss, measured_at, most_loss
from kvlatent.engines.serving_figures import ServingFigures
from kvlatent.model.widths import Width, Widths, width_per_layer
from kvlatent.planning.candidates import Candidates
from kvlatent.planning.predicted_errors import LayerErrors

__all__ = ["CacheOption", "KVBudget", "best_in_each_eighth", "order_options", "refused_widths"]

_EIGHTHS = 8


@dataclass(frozen=True)
class KVBudget:
    """What the caches of all sequences may hold together.

    Args:
        kv_bytes: bytes.
        context: tokens of one sequence.
        batch: sequences at once.
    """

    kv_bytes: float
    context: int
    batch: int = 1

    def bytes_of(self, figures: ServingFigures) -> float:
        """Of the latent model's caches."""
        return self.batch * figures.latent.cache_bytes(self.context)


@dataclass(frozen=True)
class CacheOption:
    """Widths in a KV dtype, and what they are worth.

    Args:
        d_qk, d_vo: widths in channels, one number or one per layer; `head_dim` the original's.
        kv_dtype: of the cache.
        table: scope of the rotary table.
        figures: bytes of the model and of its cache in that dtype, beside the original's in 16 bits.
        predicted: of the widths alone, nats a token; None without a text.
    """

    d_qk: Width
    d_vo: Width
    head_dim: int
    kv_dtype: KVDtype
    table: str
    figures: ServingFigures
    predicted: float | None = None

    @property
    def measured(self) -> tuple[MeasuredLoss, ...]:
        """At this share of the width and in this KV dtype, of whichever model, the least loss first."""
        if not (isinstance(self.d_qk, int) and isinstance(self.d_vo, int)):
            return ()
        return measured_at(self.d_qk, self.d_vo, self.head_dim, self.table, self.kv_dtype)

    @property
    def loss(self) -> float | None:
        """What the pair is thought to lose, nats a token; None where its KV dtype was not measured."""
        if self.predicted is not None and self.kv_dtype.is_lossless:
            return self.predicted
        keys, values = (min(width_per_layer(side)) for side in (self.d_qk, self.d_vo))
        return most_loss(keys, values, self.head_dim, self.table, self.kv_dtype)

    def summary(self, budget: KVBudget) -> dict[str, Any]:
        """JSON-able."""
        latent = self.figures.latent
        widths = {*width_per_layer(self.d_qk), *width_per_layer(self.d_vo)}
        return {
            **Widths(self.d_qk, self.d_vo).to_dict(),  # ty: ignore[invalid-argument-type]
            "kv_dtype": self.kv_dtype.name,
            "bytes": budget.bytes_of(self.figures),
            "bytes_per_token": latent.bytes_per_token,
            "share": latent.bytes_per_token / self.figures.original.bytes_per_token,
            "maximum_context": latent.cache_only().maximum_context(budget.kv_bytes, budget.batch),
            "read_bytes_per_step": latent.read_bytes + budget.bytes_of(self.figures),
            "decode_speedup": self.figures.speedup(budget.context, budget.batch),
            "loss": {
                "is_original": self.kv_dtype.is_lossless and widths == {self.head_dim},
                "predicted": self.predicted,
                "measured": [loss.summary() for loss in self.measured],
            },
            "ran": self.kv_dtype.ran,
            "note": self.kv_dtype.note_at(*widths),
        }


def best_in_each_eighth(
    candidates: Candidates,
    errors: LayerErrors | None,
    budget: KVBudget,
    figures_of: Callable[[int, int], ServingFigures],
) -> Iterator[tuple[int, int, float | None]]:
    """(d_qk, d_vo, predicted error) of the best widths that fit, for each eighth of the original cache that has any.

    Without errors the widest is the best, and of equally wide ones the most even.

    Args:
        candidates: widths that engine and KV dtype take.
        errors: of narrow keys and values, see `measured_errors`.
        budget: that they are to fit into; figures_of: bytes of these widths.
    """
    best: dict[int, tuple[tuple[float, ...], int, int, float | None]] = {}
    costs = None if errors is None else (errors.keys.mean(0).tolist(), errors.values.mean(0).tolist())
    for d_qk, d_vo in candidates.splits(1):
        eighth = -(-_EIGHTHS * (d_qk + d_vo) // (2 * candidates.head_dim))
        error = None if costs is None else costs[0][d_qk // 2] + costs[1][d_vo]
        rank = (error or 0.0, -float(d_qk + d_vo), float(abs(d_qk - d_vo)))
        if eighth in best and rank >= best[eighth][0]:
            continue
        if budget.bytes_of(figures_of(d_qk, d_vo)) <= budget.kv_bytes:
            best[eighth] = rank, d_qk, d_vo, error
    for _, row in sorted(best.items(), reverse=True):
        yield row[1:]


def refused_widths(candidates: Candidates, kv_dtype: KVDtype) -> list[int]:
    """Of the eighths of the head width that the engine takes, those that a KV dtype of it does not take."""
    step = candidates.head_dim / _EIGHTHS
    return [width for width in candidates.widths if not (width / step) % 1 and not kv_dtype.takes(width)]


def order_options(options: Sequence[CacheOption], budget: KVBudget) -> list[CacheOption]:
    """Those whose loss is known or bounded come first, by loss, then the others by that of their widths; then by bytes."""

    def rank(option: CacheOption) -> tuple[bool, float, float]:
        loss = option.loss
        known = option.predicted if loss is None else loss
        return loss is None, known or 0.0, -budget.bytes_of(option.figures)

    return sorted(options, key=rank)
