"""Which channel pairs of the keys to keep, by the statistics, and what keeping fewer costs.

Shapes: L layers, N query heads, K key-value heads, P channel pairs, M matrices that share one set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvlatent.model.config import TABLE_SCOPES as SCOPES
from kvlatent.model.config import Channels
from kvlatent.model.widths import width_per_layer
from kvlatent.selection.pair_search import greedy_order, kept_error, search
from kvlatent.selection.statistics import LayerStatistics, Statistics
from kvlatent.selection.unrotated import choose_rotated

__all__ = [
    "RULES",
    "SCOPES",
    "check_shared_width",
    "choose_pairs",
    "key_errors",
    "scope_errors",
    "strongest_pairs",
]

RULES = ("gram", "energy")
_SHARPEST = 1e-12  # least total of a Gram matrix, over the head's energy, that is more than rounding
_TINY = torch.finfo(torch.float64).tiny
Pairs = Channels
"""Kept channel pairs by layer, then by key-value head."""


def choose_pairs(
    statistics: Statistics,
    d_qk: int | tuple[int, ...],
    scope: str = "head",
    rule: str = "gram",
    *,
    factored: bool = False,
) -> Pairs:
    """Kept pairs by layer, then by key-value head, with the nesting of `LatentConfig.channels`.

    Args:
        d_qk: key width, one number or one per layer.
        scope: who shares a set: "head" (each key-value head has its own), "layer" or "model".
        rule: "gram" (see `search`) or "energy" (see `strongest_pairs`).
        factored: unrotated channels are (see `unrotated`), so that of their pairs the first ones stand for all.

    Raises:
        ValueError: an unknown scope or rule, or one table for layers of different widths.
    """
    if rule not in RULES:
        raise ValueError(f"unknown pair rule {rule!r}; choose one of {', '.join(RULES)}")
    if rule == "energy":
        return strongest_pairs([_energy(layer) for layer in statistics.layers], d_qk, scope)
    groups = groups_of(statistics)
    if factored:
        return _beside_factored(statistics, d_qk, scope, groups)
    members = [list(weighted_grams(layer).split(groups)) for layer in statistics.layers]
    return _pick_per_set(members, d_qk, scope, torch.cat, lambda grams, number: search(grams, number)[0])


def _beside_factored(statistics: Statistics, d_qk: int | tuple[int, ...], scope: str, groups: int) -> Pairs:
    """`choose_pairs` where unrotated channels are factored; layers without them choose as always."""
    layers = [(layer, weighted_grams(layer)) for layer in statistics.layers]
    widths = width_per_layer(d_qk, len(layers))
    check_shared_width(widths, scope)
    if scope == "model":
        return (tuple(choose_rotated(layers, groups, widths[0], False)),)
    heads_differ = scope == "head"
    return tuple(
        tuple(choose_rotated([layer], groups, width, heads_differ))
        for layer, width in zip(layers, widths, strict=True)
    )


def strongest_pairs(energies: list[Tensor], d_qk: int | tuple[int, ...], scope: str = "head") -> Pairs:
    """Pairs of largest energy E|q_j|^2 E|k_j|^2 (MHA2MLA's 2-norm rule); as `choose_pairs`.

    Args:
        energies: [K, P] a layer, queries summed over the group.
    """
    return _pick_per_set(
        [list(layer) for layer in energies],
        d_qk,
        scope,
        lambda parts: torch.stack(parts).sum(0),
        lambda energy, number: energy.argsort(descending=True)[:number].tolist(),
    )


def _pick_per_set(
    members: list[list[Tensor]],
    d_qk: int | tuple[int, ...],
    scope: str,
    join: Callable[[list[Tensor]], Tensor],
    pick: Callable[[Tensor, int], list[int]],
) -> Pairs:
    """`pick` for every set of heads that share their pairs; `join` puts the statistics of several heads together."""
    if scope not in SCOPES:
        raise ValueError(f"unknown table scope {scope!r}; choose one of {', '.join(SCOPES)}")
    widths = width_per_layer(d_qk, len(members))
    check_shared_width(widths, scope)
    if scope == "model":
        members, widths = [[join([head for layer in members for head in layer])]], widths[:1]
    elif scope == "layer":
        members = [[join(layer)] for layer in members]
    return tuple(
        tuple(tuple(sorted(pick(member, width // 2))) for member in layer)
        for layer, width in zip(members, widths, strict=True)
    )


def check_shared_width(widths: Sequence[int], scope: str) -> None:
    """Raise `ValueError` where layers of different key widths are to share one table."""
    if scope == "model" and len(set(widths)) > 1:
        raise ValueError(
            f"one rotary table for the model needs one key width: got d_qk from {min(widths)} to {max(widths)}; use "
            "--table layer or one width"
        )


def weighted_grams(layer: LayerStatistics) -> Tensor:
    """Output Gram matrices as shares of their total, times the energy that the head puts out: [N, P, P].

    The total is what dropping all pairs would cost to first order. For a sharp head, which looks at one token, that is
    next to nothing (every variance under its attention weights vanishes), and yet without its pairs it would look
    elsewhere and all it puts out would be wrong. Heads and layers that share a set are added in this unit.
    """
    total = layer.output_gram.sum((1, 2)).clamp_min(_SHARPEST * layer.head_energy).clamp_min(_TINY)
    return layer.output_gram * (layer.head_energy / total)[:, None, None]


def relative_grams(layer: LayerStatistics) -> Tensor:
    """Output Gram matrices over the layer's output energy, so that layers and heads can be added: [N, P, P]."""
    return layer.output_gram / layer.output_energy.clamp_min(torch.finfo(torch.float64).tiny)


def groups_of(statistics: Statistics) -> int:
    """Query heads per key-value head."""
    return statistics.num_heads // statistics.num_key_value_heads


def _energy(layer: LayerStatistics) -> Tensor:
    """E|q_j|^2 E|k_j|^2 of each key-value head, summed over its query heads: [K, P]."""
    return layer.query_energy.unflatten(0, (len(layer.key_energy), -1)).sum(1) * layer.key_energy


def key_errors(statistics: Statistics, scope: str = "head") -> Tensor:
    """First-order squared error of the attention output when every head keeps n pairs with gains: [L, P + 1].

    Along the greedy path of the sets that `scope` names; in the unit of `LayerStatistics.value_errors`.
    """
    size = groups_of(statistics) if scope == "head" else statistics.num_heads
    layers = [layer.output_gram for layer in statistics.layers]
    if scope != "model":
        paths = [[_path(part) for part in grams.split(size)] for grams in layers]
        return torch.stack([torch.tensor(each, dtype=torch.float64).sum(0) for each in paths])
    order = greedy_order(torch.cat([weighted_grams(layer) for layer in statistics.layers]))
    prefixes = [tuple(order[:n]) for n in range(len(order) + 1)]
    return torch.tensor([[kept_error(layer, kept) for kept in prefixes] for layer in layers]).double()


def _path(grams: Tensor) -> list[float]:
    return search(grams, grams.shape[-1], exchange=False)[1]


def scope_errors(statistics: Statistics, d_qk: int | tuple[int, ...]) -> dict[str, float]:
    """What each scope of the rotary table costs: relative squared error of the attention output, mean over layers.

    First order, with gains, before alignment. "model" is left out where layers differ in width.
    """
    uniform = len(set(width_per_layer(d_qk))) == 1
    groups = groups_of(statistics)
    prices = {}
    for scope in SCOPES if uniform else SCOPES[:2]:
        chosen = choose_pairs(statistics, d_qk, scope)
        chosen = chosen * (len(statistics.layers) // len(chosen))
        total = 0.0
        for layer, sets in zip(statistics.layers, chosen, strict=True):
            heads = relative_grams(layer).split(groups)
            sets = sets * (len(heads) // len(sets))
            total += sum(kept_error(grams, kept) for grams, kept in zip(heads, sets, strict=True))
        prices[scope] = total / len(statistics.layers)
    return prices
