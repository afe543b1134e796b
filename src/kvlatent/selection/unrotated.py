"""Key channels that no rotation touches: the best low-rank map of them, instead of a selection.

Where nothing turns, q . k = q^T A^T B k for any A, B with A^T B = 1 on what matters: r channels B k are cached, and every
query head reads them by an A of its own. To second order in the logits the error is sum_h w_h tr C_q,h (C_k,h - C_k,h B^T
(B C_k,h B^T)^-1 B C_k,h), with the second moments C_q of the queries and C_k of the keys, centred under attention weights.

Shapes: N query heads, K key-value heads, G = N / K, u unrotated channels of a head, P channel pairs of which R rotate.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvlatent.selection.choices import Choices
from kvlatent.selection.pair_search import greedy_order, kept_error, search
from kvlatent.selection.statistics import LayerStatistics

__all__ = ["UnrotatedMaps", "choose_rotated", "selected_where_maps_have_no_place", "unrotated_maps"]

_SHRINK = 1e-6  # of the mean diagonal, so that moments can be inverted
_TINY = 1e-30


def selected_where_maps_have_no_place(choices: Choices, widths: Collection[int], qk_norm: str) -> Choices:
    """The choices, with unrotated channels selected where there are none or their maps have no place.

    A sliced QK-norm has none, and layers that share one table share how many channels rotate.

    Args:
        widths: how many channels of a head no rotation touches, over all layers; empty where nothing is known of them.
    """
    apart = choices.table != "model" or len(set(widths)) == 1
    if set(widths) - {0} and qk_norm == "full" and apart:
        return choices
    return replace(choices, unrotated="selected")


class UnrotatedMaps(NamedTuple):
    """Maps of the unrotated channels: `keys` B [K, r, u] and `queries` A [N, r, u], float64."""

    keys: Tensor
    queries: Tensor


def unrotated_maps(layer: LayerStatistics, groups: int, width: int) -> UnrotatedMaps:
    """The best maps to so many channels.

    B = V^T C_k^-1/2 with the leading eigenvectors V of C_k^1/2 (sum_h w_h C_q,h) C_k^1/2, exact for one query head a key-value
    head or equal C_k; A_h = (B C_k,h B^T)^-1 B C_k,h, the best for that B.

    Args:
        groups: G; width: r, 0 < r <= u.
    """
    keys, queries = [], []
    members = _shrunk(layer.unrotated_keys).split(groups)
    for moments, (_, vectors, inverse_root) in zip(members, _spectra(layer, groups), strict=True):
        basis = vectors[:, :width].T @ inverse_root
        kept = moments @ basis.T  # [G, u, r]
        keys.append(basis)
        queries.append(torch.linalg.solve(basis @ kept, kept.transpose(1, 2)))
    return UnrotatedMaps(torch.stack(keys), torch.cat(queries))


def choose_rotated(
    members: list[tuple[LayerStatistics, Tensor]], groups: int, d_qk: int, heads_differ: bool
) -> list[tuple[int, ...]]:
    """Pairs to keep where unrotated channels are factored: rotated ones, then the first of those that are not.

    How many rotate is what costs least: the Gram matrices say what dropped rotated pairs cost, and of the unrotated block,
    what its spectra leave out.

    Args:
        members: layers that share how many pairs rotate, each with its Gram matrices [N, P, P] in a unit that layers share.
        groups: G; d_qk: key width; heads_differ: every key-value head keeps pairs of its own, otherwise all keep the same.

    Returns:
        A list for every key-value head of every layer, or one for all.
    """
    unrotated = members[0][0].unrotated_keys.shape[-1]
    rotated = members[0][1].shape[-1] - unrotated // 2
    turning = [grams[:, :rotated, :rotated] for _, grams in members]
    sets = (
        [part for grams in turning for part in grams.split(groups)] if heads_differ else [torch.cat(turning)]
    )
    least, most = max(0, (d_qk - unrotated + 1) // 2), min(rotated, d_qk // 2)
    rest = [
        sum(costs) for costs in zip(*(_unrotated_costs(*member, groups) for member in members), strict=True)
    ]
    orders = [greedy_order(grams) for grams in sets] if rotated else []
    best = min(
        range(least, most + 1),
        key=lambda count: (
            sum(kept_error(grams, tuple(order[:count])) for grams, order in zip(sets, orders, strict=False))
            + rest[d_qk - 2 * count],
            -count,
        ),
    )
    chosen = [search(grams, best)[0] if rotated else [] for grams in sets]
    idle = range(rotated, rotated + d_qk // 2 - best)
    return [(*kept, *idle) for kept in chosen]


def _unrotated_costs(layer: LayerStatistics, grams: Tensor, groups: int) -> list[float]:
    """What keeping r unrotated channels costs, for r = 0 ... u: a share of what dropping all of them would."""
    first = grams.shape[-1] - layer.unrotated_keys.shape[-1] // 2
    costs = torch.zeros(layer.unrotated_keys.shape[-1] + 1, dtype=torch.float64)
    wholes = grams[:, first:, first:].sum((1, 2)).split(groups)
    for whole, (values, *_) in zip(wholes, _spectra(layer, groups), strict=True):
        left = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        costs += float(whole.sum()) * left / left[0].clamp_min(_TINY)
    return costs.tolist()


def _spectra(layer: LayerStatistics, groups: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every key-value head: eigenvalues [u] and vectors [u, u] of C_k^1/2 C_q C_k^1/2, largest first, and C_k^-1/2."""
    spectra = []
    heads = (layer.unrotated_queries, _shrunk(layer.unrotated_keys), layer.head_energy)
    for queries, keys, energy in zip(*(part.split(groups) for part in heads), strict=True):
        weights = energy.clamp_min(_TINY) / (queries * keys).sum((1, 2)).clamp_min(_TINY)
        values, vectors = torch.linalg.eigh(keys.mean(0))
        values = values.clamp_min(_TINY)
        root = (vectors * values.sqrt()) @ vectors.T
        inner = root @ (weights[:, None, None] * queries).sum(0) @ root
        found = torch.linalg.eigh(inner)
        spectra.append(
            (
                found.eigenvalues.flip(0).clamp_min(0),
                found.eigenvectors.flip(1),
                (vectors / values.sqrt()) @ vectors.T,
            )
        )
    return spectra


def _shrunk(moments: Tensor) -> Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments + _SHRINK * mean[:, None, None] * eye
