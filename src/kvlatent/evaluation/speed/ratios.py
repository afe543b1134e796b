"""From timed runs to the rows of a bench document: medians, ratios inside rounds, the bound by bytes, longest contexts.

Times of the second model are given as how many times faster it is; bytes as its share. The bound takes the bytes that
were read off the tensors; it knows nothing of arithmetic, launches or what unpacking costs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlatent.engines.roofline import decode_speedup, maximum_context
from kvlatent.evaluation.speed.memory import weight_bytes
from kvlatent.evaluation.speed.variants import MeasuredCell
from kvlatent.model.families import family_of

__all__ = ["Spread", "cell_rows", "largest_contexts", "ratio_rows", "ratios", "spread", "stacked_rows"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of two values or more, interpolated between them."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios, each of one round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def cell_rows(cells: Sequence[MeasuredCell], new_tokens: int) -> list[dict[str, Any]]:
    """One row for each batch, context, cache and model.

    Times are medians, with quartiles beside them: "prefill_s" (seconds for the prompts), "decode_ms_per_token" (of one
    step, which adds a token to every sequence), "tokens_per_s" (of all sequences). "cache_bytes" is held after the
    prompt by all sequences, "last_cache_bytes" at the end; "peak_bytes" is null where it cannot be measured.
    """
    rows = []
    for cell in cells:
        prefill = spread([run.prefill for run in cell.runs])
        step = spread([1e3 * run.decode / new_tokens for run in cell.runs])
        rows.append(
            {
                "batch": cell.batch,
                "context": cell.context,
                "model": cell.role,
                "cache": cell.cache,
                "prefill_s": prefill.median,
                "prefill_s_quartiles": [prefill.lower, prefill.upper],
                "decode_ms_per_token": step.median,
                "decode_ms_per_token_quartiles": [step.lower, step.upper],
                "tokens_per_s": 1e3 * cell.batch / step.median,
                "cache_bytes": cell.runs[-1].cache_bytes,
                "last_cache_bytes": cell.runs[-1].last_cache_bytes,
                "peak_bytes": cell.peak_bytes,
            }
        )
    return rows


def ratio_rows(cells: Sequence[MeasuredCell], read: Mapping[str, float]) -> list[dict[str, Any]]:
    """The latent model against the original with the same cache; `read` has the bytes of the weights that a step reads, by role.

    "prefill" and "decode": how many times faster, with quartiles; "cache_bytes": the share; "predicted_decode": how
    many times faster a step can be by the bytes that it reads.
    """
    by_place = {(cell.batch, cell.context, cell.cache, cell.role): cell for cell in cells}
    rows = []
    for cell in cells:
        place = (cell.batch, cell.context, cell.cache)
        if cell.role == "latent" and (*place, "original") in by_place:
            against = by_place[*place, "original"]
            row = dict(zip(("batch", "context", "cache"), place, strict=True))
            rows.append(row | _against(cell, against, read))
    return rows


def stacked_rows(cells: Sequence[MeasuredCell], read: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every model with every cache against one of them: the first model (the original) with the first cache.

    So a quantised cache, narrower heads and both together stand side by side. The figures are those of `ratio_rows`.
    """
    rows = []
    role, cache = next(iter(read)), cells[0].cache if cells else ""
    references = {(c.batch, c.context): c for c in cells if (c.role, c.cache) == (role, cache)}
    for cell in cells:
        against = references.get((cell.batch, cell.context))
        if against is None:  # it ran out of memory
            continue
        row = {"batch": cell.batch, "context": cell.context, "model": cell.role, "cache": cell.cache}
        rows.append(row | _against(cell, against, read))
    return rows


def _against(cell: MeasuredCell, reference: MeasuredCell, read: Mapping[str, float]) -> dict[str, Any]:
    """How many times faster a cell is than a reference, its share of the bytes, and the bound by bytes."""
    prefill = _faster(cell, reference, "prefill")
    decode = _faster(cell, reference, "decode")
    sizes = [each.runs[-1].cache_bytes for each in (reference, cell)]
    weights = [read[each.role] for each in (reference, cell)]
    return {
        "prefill": prefill.median,
        "prefill_quartiles": [prefill.lower, prefill.upper],
        "decode": decode.median,
        "decode_quartiles": [decode.lower, decode.upper],
        "cache_bytes": sizes[1] / sizes[0],
        # All sequences' bytes are counted, hence a batch of one.
        "predicted_decode": decode_speedup(weights[0], sizes[0], weights[1], sizes[1]),
    }


def _faster(cell: MeasuredCell, reference: MeasuredCell, figure: str) -> Spread:
    return ratios(
        [getattr(run, figure) for run in reference.runs], [getattr(run, figure) for run in cell.runs]
    )


def largest_contexts(
    cells: Sequence[MeasuredCell], models: Mapping[str, Any], memory: float
) -> list[dict[str, Any]]:
    """Longest contexts at which weights and caches fit a memory, by batch, cache and model.

    The bytes of a token are those measured after the longest prompt. Activations are not counted, nor the up to 127
    newest tokens that upstream's group-wise quantised caches keep unquantised. "tokens" is null where a window keeps the
    cache from growing, and 0 where the weights alone do not fit.
    """
    longest: dict[tuple[int, str, str], MeasuredCell] = {}
    for cell in cells:
        key = (cell.batch, cell.cache, cell.role)
        if key not in longest or cell.context > longest[key].context:
            longest[key] = cell
    rows = []
    for (batch, cache, role), cell in longest.items():
        model = models[role]
        weights, family = weight_bytes(model), family_of(model.config)
        windows = [
            family.sliding_window(model.config, layer) for layer in family.attention_layers(model.config)
        ]
        rates = cell.runs[-1].token_bytes
        fits = memory >= weights
        tokens = maximum_context(memory, weights, rates, windows, batch) if fits else 0
        rows.append({"batch": batch, "cache": cache, "model": role, "tokens": tokens})
    return rows
