"""From a share of the cache to widths: the split between keys and values, and between layers, that costs least.

The predicted errors of keys and of values (`prediction`) are added and minimised within the budget. No weights are
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlatent.engines.facts import TABLE_SCOPES, engines_for
from kvlatent.engines.kv_dtypes import KVDtype
from kvlatent.model.widths import Width, Widths, width_per_layer
from kvlatent.planning.candidates import Candidates, candidates_for
from kvlatent.planning.layer_groups import best_options, group_layers
from kvlatent.planning.predicted_errors import MEASURED, PREDICTED, LayerErrors, predicted_errors
from kvlatent.selection.statistics import Statistics

__all__ = ["SHARES", "CurvePoint", "WidthPlan", "error_curve", "plan"]

SHARES = tuple(sixteenths / 16 for sixteenths in range(2, 17))
"""Shares of the cache that `error_curve` looks at when none are given."""

_SAME = 1e-9  # errors that differ by less are the same (they are relative to the output's energy)


@dataclass(frozen=True)
class WidthPlan:
    """Widths for a budget, and what they are predicted to cost.

    Args:
        kv: share of the cache that was allowed.
        d_qk, d_vo: widths in channels: one number, or one per layer where they differ.
        key_error, value_error: what narrower keys and narrower values are predicted to cost, averaged over layers, in
            `unit`: the squared error of the attention output relative to its energy, to first order and before the
            output refit, or the divergence that a layer alone was measured to cost. Good for comparing plans, not a perplexity.
        head_dim: original head width.
        table: scope of the rotary table it was predicted for.
        aligned: whether attention alignment is counted on.
        unit: of the errors, see `LayerErrors`.
    """

    kv: float
    d_qk: int | tuple[int, ...]
    d_vo: int | tuple[int, ...]
    key_error: float
    value_error: float
    head_dim: int
    table: str = "head"
    aligned: bool = True
    unit: str = PREDICTED

    @property
    def error(self) -> float:
        """Predicted relative squared error of keys and values together."""
        return self.key_error + self.value_error

    @property
    def share(self) -> float:
        """Share of the original cache that the widths use, at most `kv`."""
        return (_mean(self.d_qk) + _mean(self.d_vo)) / (2 * self.head_dim)

    def engines(self, model_type: str | None = None) -> dict[str, tuple[str, ...]]:
        """Engines that run these widths, by scope of the rotary table; `model_type` of the original, where known."""
        return {
            scope: engines_for(self.d_qk, self.d_vo, scope, model_type=model_type) for scope in TABLE_SCOPES
        }

    def summary(self, model_type: str | None = None) -> dict[str, Any]:
        """JSON-able: widths, share, predicted errors, engines by scope of the rotary table."""
        return {
            "kv": self.kv,
            **Widths(self.d_qk, self.d_vo).to_dict(),
            "share": self.share,
            "predicted_error": {
                "keys": self.key_error,
                "values": self.value_error,
                "total": self.error,
                "unit": self.unit,
            },
            "table": self.table,
            "aligned": self.aligned,
            "engines": {scope: list(names) for scope, names in self.engines(model_type).items()},
        }


@dataclass(frozen=True)
class CurvePoint:
    """One budget: the best split between keys and values, and the best with d_qk = d_vo."""

    kv: float
    best: WidthPlan
    symmetric: WidthPlan


def plan(
    statistics: Statistics,
    kv: float = 0.5,
    *,
    engine: str | None = None,
    table: str | None = None,
    per_layer: bool = False,
    symmetric: bool = False,
    aligned: bool = True,
    multiple: int | None = None,
    kv_dtype: KVDtype | None = None,
    measured: LayerErrors | None = None,
) -> WidthPlan:
    """The widths with the least predicted error that keep at most the share `kv` of the cache.

    Args:
        statistics: of the model.
        kv: share of the original cache, in (0, 1].
        engine: one that must be able to run the result (a key of `engines.ENGINES`), or None.
        table: scope of the rotary table, "head", "layer" or "model"; left out, the engine's own.
        per_layer: let layers differ, by at most a factor of 2 from the uniform plan; in at most three groups where an engine
            is named or errors are not measured.
        symmetric: only d_qk = d_vo (some engines need it anyway).
        aligned: the conversion aligns the attention, so key errors count `prediction.ALIGNED_SHARE` of what they are.
        multiple: widths are multiples of this; left out, of 4, and of 8 when an engine is named.
        kv_dtype: of the cache, which may not take every width.
        measured: errors to go by instead of those that the statistics predict, of the same scope of the table.

    Raises:
        ValueError: a share outside (0, 1] or too small for any width, an unknown engine or table, a table or
            different layers that the engine does not take, a multiple that it does not take, or statistics without
            energy.
    """
    candidates = candidates_for(
        statistics.head_dim,
        engine,
        table,
        per_layer=per_layer,
        symmetric=symmetric,
        multiple=multiple,
        kv_dtype=kv_dtype,
    )
    splits = candidates.splits(kv)
    errors = _errors(statistics, candidates, measured, aligned=aligned)
    uniform = _uniform(kv, splits, errors)
    return _by_layer(uniform, candidates, errors) if per_layer else uniform


def error_curve(
    statistics: Statistics,
    shares: Sequence[float] | None = None,
    *,
    engine: str | None = None,
    table: str | None = None,
    aligned: bool = True,
    multiple: int | None = None,
    kv_dtype: KVDtype | None = None,
    measured: LayerErrors | None = None,
) -> tuple[CurvePoint, ...]:
    """Predicted error against budget: for each share the best split and the symmetric one, the same in every layer.

    Args:
        shares: of the cache; left out, those of `SHARES` that some width can meet.
        statistics, engine, table, aligned, multiple, kv_dtype, measured: as for `plan`.

    Raises:
        ValueError: as `plan`.
    """
    candidates = candidates_for(statistics.head_dim, engine, table, multiple=multiple, kv_dtype=kv_dtype)
    equal = replace(candidates, symmetric=True)
    if shares is None:
        shares = [kv for kv in SHARES if candidates.meets(kv)]
    splits = [(kv, candidates.splits(kv), equal.splits(kv)) for kv in shares]
    errors = _errors(statistics, candidates, measured, aligned=aligned)
    return tuple(
        CurvePoint(kv, _uniform(kv, all_, errors), _uniform(kv, same, errors)) for kv, all_, same in splits
    )


def _errors(
    statistics: Statistics, candidates: Candidates, measured: LayerErrors | None, *, aligned: bool
) -> LayerErrors:
    """Those that were measured, if they fit, or those that the statistics predict."""
    errors = measured or predicted_errors(statistics, candidates.table, aligned=aligned)
    if errors.table != candidates.table:
        raise ValueError(
            f"errors hold for the rotary table that they were measured with: got table={errors.table} for a plan with "
            f"table={candidates.table}; measure with that one"
        )
    return errors


def _uniform(kv: float, splits: list[tuple[int, int]], errors: LayerErrors) -> WidthPlan:
    """The best split of all layers alike; equals go to the more symmetric one, then to the wider one."""
    keys, values = errors.keys.mean(0).tolist(), errors.values.mean(0).tolist()
    costs = {(d_qk, d_vo): keys[d_qk // 2] + values[d_vo] for d_qk, d_vo in splits}
    least = min(costs.values())
    equal = [split for split, cost in costs.items() if cost <= least + _SAME]
    d_qk, d_vo = min(equal, key=lambda split: (abs(split[0] - split[1]), -sum(split)))
    head_dim = errors.values.shape[1] - 1
    return WidthPlan(
        kv, d_qk, d_vo, keys[d_qk // 2], values[d_vo], head_dim, errors.table, errors.aligned, errors.unit
    )


def _by_layer(uniform: WidthPlan, candidates: Candidates, errors: LayerErrors) -> WidthPlan:
    """The best widths of every layer, or in at most three groups, around a uniform plan and within its budget."""
    assert isinstance(uniform.d_qk, int) and isinstance(uniform.d_vo, int)
    options = [
        (d_qk, d_vo)
        for d_qk in candidates.near(uniform.d_qk)
        for d_vo in candidates.near(uniform.d_vo)
        if d_qk == d_vo or not candidates.symmetric
    ]
    keys = errors.keys[:, [d_qk // 2 for d_qk, _ in options]]  # [L, options]
    values = errors.values[:, [d_vo for _, d_vo in options]]
    room = candidates.room(uniform.kv, len(keys))
    # Errors of first order are not to be trusted with more than a few groups, and an engine takes no more.
    free = errors.unit == MEASURED and candidates.engine is None
    divide = best_options if free else group_layers
    chosen = divide((keys + values).numpy(), [sum(option) for option in options], room)
    layers = range(len(chosen))
    key_error, value_error = (float(side[layers, chosen].mean()) for side in (keys, values))
    if key_error + value_error >= uniform.error - _SAME:
        return uniform
    sides = ([options[choice][side] for choice in chosen] for side in (0, 1))
    widths = Widths.check(*sides, candidates.head_dim, len(chosen))
    return replace(uniform, **widths._asdict(), key_error=key_error, value_error=value_error)


def _mean(width: Width) -> float:
    return sum(width_per_layer(width)) / len(width_per_layer(width))
