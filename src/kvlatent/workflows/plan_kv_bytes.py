"""A plan for a cache of so many bytes: widths in the KV dtypes of an engine, with what each loses as far as it is known.

No text is needed, since bytes follow from the config and the measured losses from committed tables. With the
statistics of a text the widths are chosen for the model at hand, and may differ by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvlatent.engines.facts import check_engine
from kvlatent.engines.kv_dtypes import KVDtype, kv_dtype_named, kv_dtypes_of
from kvlatent.engines.serving_figures import ServingFigures, serving_figures
from kvlatent.model.families import head_dim_of
from kvlatent.model.widths import Width
from kvlatent.planning.candidates import candidates_for
from kvlatent.planning.kv_budget import (
    CacheOption,
    KVBudget,
    best_in_each_eighth,
    order_options,
    refused_widths,
)
from kvlatent.planning.predicted_errors import LayerErrors
from kvlatent.planning.width_plan import plan as plan_widths
from kvlatent.selection.statistics import Statistics

__all__ = ["Cache", "check_counts", "plan_kv_bytes"]

_WEIGHT_BYTES = 2  # engines serve in 16 bits what was saved in 32


@dataclass(frozen=True)
class Cache:
    """What a cache is to be kept in, and by whom.

    Args:
        engine, backend: see `kv_dtypes_of`; None for the defaults.
        kv_dtype: the one to plan with; None for all of the engine's in 16 bits or fewer.
        table: scope of the rotary table.
        qk_norm: see `latent_config.choose`.
        per_layer: layers may differ in width.
    """

    engine: str | None
    backend: str | None
    kv_dtype: str | None
    table: str
    qk_norm: str
    per_layer: bool = False

    def dtypes(self) -> list[KVDtype]:
        """Those that are searched.

        Raises:
            ValueError: the engine has no such backend or type.
        """
        if self.kv_dtype is not None:
            return [kv_dtype_named(self.kv_dtype, self.engine, self.backend)]
        _, known = kv_dtypes_of(self.engine, self.backend)
        return [dtype for dtype in known if max(dtype.key_bits, dtype.value_bits) <= 16]


def check_counts(context: int | None, batch: int | None) -> None:
    """Raise `ValueError` unless tokens and sequences, where they are given, are positive."""
    for flag, count, instead in (("context", context, "32k"), ("batch", batch, "1")):
        if count is not None and count < 1:
            raise ValueError(f"--{flag} must be at least 1: got {count}; try --{flag} {instead}")


def plan_kv_bytes(
    config: Any,
    cache: Cache,
    kv_bytes: float,
    context: int | None,
    batch: int,
    collect: Callable[[], tuple[Statistics, LayerErrors, dict[str, Any]]] | None,
) -> dict[str, Any]:
    """Widths x KV dtypes whose caches fit into `kv_bytes`, ordered by what they lose as far as it is known.

    Args:
        config: of the original.
        cache: who keeps it, and in what.
        kv_bytes: of the caches of all sequences together.
        context: tokens of one sequence; None for the longest that the original was made for.
        batch: sequences at once.
        collect: gives the statistics of a text, the errors of narrow widths and the figures of the calibration; called
            once it is known that something fits. None without a text.

    Returns:
        {"budget", "options": see `CacheOption.summary`, "refused": widths that a KV dtype does not take, "too_large": KV
        dtypes none of whose widths fit, "head_dim", "engine", "backend", "table", "trained_context", "notes",
        "calibration"}.

    Raises:
        ValueError: nothing fits, an engine, backend or KV dtype that does not exist or cannot run the model, or layers that
            are to differ without a text that tells them apart.
    """
    if cache.per_layer and collect is None:
        raise ValueError(
            "--per-layer needs a text that tells layers apart: got none; give --data FILE or --statistics FILE"
        )
    trained = config.max_position_embeddings
    budget = KVBudget(kv_bytes, trained if context is None else context, batch)
    search = partial(_search, config, cache, budget)
    options, too_large = search(None, None)
    calibration = None
    if collect is not None:
        statistics, errors, calibration = collect()
        options, too_large = search(errors, statistics if cache.per_layer else None)
    return {
        "budget": {"kv_bytes": kv_bytes, "context": budget.context, "batch": batch},
        "options": [option.summary(budget) for option in order_options(options, budget)],
        "refused": _refused(config, cache),
        "too_large": too_large,
        "head_dim": head_dim_of(config),
        "engine": cache.engine,
        "backend": kv_dtypes_of(cache.engine, cache.backend)[0],
        "table": cache.table,
        "per_layer": cache.per_layer,
        "trained_context": trained,
        "notes": _notes(config, cache, budget.context, trained),
        "calibration": calibration,
    }


def _search(
    config: Any, cache: Cache, budget: KVBudget, errors: LayerErrors | None, statistics: Statistics | None
) -> tuple[list[CacheOption], list[dict[str, Any]]]:
    """What fits, and for each KV dtype in which nothing does the bytes of its smallest widths.

    With statistics, layers differ.
    """
    options: list[CacheOption] = []
    too_large: list[dict[str, Any]] = []
    head_dim = head_dim_of(config)
    everything = candidates_for(head_dim, cache.engine, cache.table, per_layer=cache.per_layer)
    if cache.engine is not None:
        least = everything.widths[0]
        check_engine(cache.engine, least, least, cache.table, model_type=str(config.model_type))
    for dtype in cache.dtypes():
        if cache.kv_dtype is None and not any(map(dtype.takes, everything.widths)):
            continue
        candidates = candidates_for(head_dim, cache.engine, cache.table, kv_dtype=dtype)
        figures_of = partial(_figures, config, cache, dtype)
        least = candidates.widths[0]
        smallest = budget.bytes_of(figures_of(least, least))
        if smallest > budget.kv_bytes:
            too_large.append({"kv_dtype": dtype.name, "d_qk": least, "d_vo": least, "bytes": smallest})
        elif statistics is not None:
            options.append(_by_layer(cache, budget, errors, statistics, dtype, figures_of))
        else:
            options += [
                CacheOption(d_qk, d_vo, head_dim, dtype, cache.table, figures_of(d_qk, d_vo), error)
                for d_qk, d_vo, error in best_in_each_eighth(candidates, errors, budget, figures_of)
            ]
    if not options:
        raise ValueError(_nothing_fits(cache, budget, too_large))
    return options, too_large


def _figures(config: Any, cache: Cache, dtype: KVDtype, d_qk: Width, d_vo: Width) -> ServingFigures:
    """Bytes with a cache of these widths in a KV dtype, beside the original's in 16 bits."""
    return serving_figures(
        config, d_qk, d_vo, element_size=_WEIGHT_BYTES, kv_dtype=dtype, qk_norm=cache.qk_norm
    )


def _by_layer(
    cache: Cache,
    budget: KVBudget,
    errors: LayerErrors | None,
    statistics: Statistics,
    dtype: KVDtype,
    figures_of: Callable[[Width, Width], ServingFigures],
) -> CacheOption:
    """The best widths of every layer in one KV dtype: the share of the channels falls until their bytes fit."""
    head_dim = statistics.head_dim
    whole = budget.bytes_of(figures_of(head_dim, head_dim))
    share = min(1.0, budget.kv_bytes / whole)
    least = candidates_for(head_dim, cache.engine, cache.table, kv_dtype=dtype).widths[0] / head_dim
    while True:
        share = max(share, least)
        found = plan_widths(
            statistics,
            share,
            engine=cache.engine,
            table=cache.table,
            per_layer=True,
            kv_dtype=dtype,
            measured=errors,
        )
        figures = figures_of(found.d_qk, found.d_vo)
        if budget.bytes_of(figures) <= budget.kv_bytes or share == least:
            return CacheOption(found.d_qk, found.d_vo, head_dim, dtype, cache.table, figures, found.error)
        share = min(share - 1 / head_dim, share * budget.kv_bytes / budget.bytes_of(figures))


def _refused(config: Any, cache: Cache) -> list[dict[str, Any]]:
    """The widths that the engine takes but not in each KV dtype, with the rule."""
    candidates = candidates_for(head_dim_of(config), cache.engine, cache.table)
    found = ((dtype, refused_widths(candidates, dtype)) for dtype in cache.dtypes())
    return [
        {"kv_dtype": dtype.name, "rule": dtype.rule, "widths": widths} for dtype, widths in found if widths
    ]


def _nothing_fits(cache: Cache, budget: KVBudget, too_large: Sequence[dict[str, Any]]) -> str:
    """One sentence: the smallest cache there is, what it was to fit into, and what would do."""
    least = min(too_large, key=lambda row: row["bytes"])
    tokens = int(budget.kv_bytes / least["bytes"] * budget.context)
    shorter = f", --context {tokens}" if tokens else ""
    return (
        f"the caches of {budget.batch} x {budget.context:,} tokens must fit into --kv-bytes: got {budget.kv_bytes:,.0f} "
        f"bytes, and the smallest, d_qk={least['d_qk']} and d_vo={least['d_vo']} in {least['kv_dtype']}, has "
        f"{least['bytes']:,.0f}; try --kv-bytes {_mebibytes(least['bytes'])}{shorter}"
    )


def _mebibytes(size: float) -> str:
    return f"{-(-size // 2**20):.0f}MiB"


def _notes(config: Any, cache: Cache, context: int, trained: int) -> list[str]:
    """What holds for all options."""
    notes = []
    if context > trained:
        notes.append(f"the original was made for {trained:,} tokens, fewer than the {context:,} asked for")
    if cache.engine == "vllm" and cache.per_layer:
        windows = serving_figures(config, head_dim_of(config), head_dim_of(config)).original.windows
        if len({window is None for window in windows}) > 1:
            notes.append(
                "vLLM may pad caches of different widths in a model that mixes sliding and full attention"
            )
    return notes
