"""Which channel pairs of the keys to keep, and the gain of each, from Gram matrices of what pairs add to the logits.

Scaling kept pair j by a_j (and dropping the others) leaves the error (1 - a)^T G (1 - a). Its minimum over gains that
vanish outside S is 1^T G 1 - b_S^T (G_SS)^-1 b_S with b = G 1, at a_S = (G_SS)^-1 b_S: choosing S is subset selection in
a least-squares problem, whose greedy step and exchange step have closed forms. Query heads keep gains of their own;
heads that share a set add up their errors.

Shapes: L layers, N query heads, K key-value heads, P channel pairs, M matrices that share one set.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import TABLE_SCOPES as SCOPES
from .statistics import LayerStatistics, Statistics

__all__ = [
    "RULES",
    "SCOPES",
    "choose_pairs",
    "key_errors",
    "pair_gains",
    "scope_errors",
    "search",
    "strongest_pairs",
]

RULES = ("gram", "energy")
Pairs = tuple[tuple[tuple[int, ...], ...], ...]

_RIDGE = 1e-3  # of the mean diagonal, towards gains of 1
_JITTER = 1e-9
_LARGEST_GAIN = 4.0
_SMALLEST_GAIN = 1e-9  # of the total error; an exchange that gains less is not made


def pair_gains(grams: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Gains of the kept pairs, one row a matrix: 1 + (G_SS + e I)^-1 G_S,dropped 1, clamped to [-4, 4].

    Args:
        grams: [M, P, P]; kept: indices of pairs.

    Returns:
        [M, len(kept)]; 1 exactly where nothing is dropped.
    """
    index = torch.tensor(kept)
    dropped = torch.ones(grams.shape[-1], dtype=grams.dtype)
    dropped[index] = 0
    inner = grams[:, index][:, :, index]
    ridge = _RIDGE * inner.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(grams.dtype).tiny
    inner = inner + ridge[:, None, None] * torch.eye(len(kept), dtype=grams.dtype)
    return (1 + torch.linalg.solve(inner, grams[:, index] @ dropped)).clamp(-_LARGEST_GAIN, _LARGEST_GAIN)


def search(grams: Tensor, number: int, *, exchange: bool = True) -> tuple[list[int], list[float]]:
    """Pairs to keep, by greedy search and then by exchanges while one helps; the errors of the greedy path.

    Args:
        grams: [M, P, P]; number: how many pairs.

    Returns:
        The pairs in ascending order, and `number + 1` errors, summed over M, after 0, 1, ... pairs (the last is that
        of the pairs returned).
    """
    grams = _jittered(grams)
    projected = grams.sum(-1)  # b, [M, P]
    total = projected.sum()
    kept: list[int] = []
    errors = [float(total)]
    for _ in range(number):
        scores = _gains_of_adding(grams, projected, kept)
        kept.append(int(scores.argmax()))
        errors.append(errors[-1] - float(scores.max()))
    while exchange and 0 < number < grams.shape[-1]:
        found = _best_exchange(grams, projected, kept)
        if found is None:
            break
        swapped = [pair for pair in kept if pair != found[0]] + [found[1]]
        error = float(total - _explained(grams, projected, swapped))
        # The error itself must fall: its estimated change can be noise, and noise would exchange for ever.
        if not error < errors[-1] - _SMALLEST_GAIN * float(total):
            break
        kept, errors[-1] = swapped, error
    return sorted(kept), [max(error, 0.0) for error in errors]


def _explained(grams: Tensor, projected: Tensor, kept: list[int]) -> Tensor:
    """b_S^T (G_SS)^-1 b_S summed over the matrices: what the kept pairs explain of the total."""
    index = torch.tensor(kept)
    chosen = projected[:, index, None]
    return (chosen * torch.linalg.solve(grams[:, index][:, :, index], chosen)).sum()


def _gains_of_adding(grams: Tensor, projected: Tensor, kept: list[int]) -> Tensor:
    """How much every pair would lower the summed error, given those kept: [P], -inf for kept ones."""
    diagonal = grams.diagonal(dim1=1, dim2=2)
    if kept:
        index = torch.tensor(kept)
        cross = grams[:, index]  # [M, n, P]
        solved = torch.linalg.solve(grams[:, index][:, :, index], cross)
        residual = projected - (solved * projected[:, index, None]).sum(1)
        diagonal = diagonal - (solved * cross).sum(1)
    else:
        residual = projected
    floor = _JITTER * grams.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    scores = (residual.square() / diagonal.clamp_min(floor)).sum(0)
    scores[kept] = float("-inf")
    return scores


def _best_exchange(grams: Tensor, projected: Tensor, kept: list[int]) -> tuple[int, int] | None:
    """The exchange that should lower the summed error most: (pair out, pair in)."""
    index = torch.tensor(kept)
    inverse = torch.linalg.inv(grams[:, index][:, :, index])
    weights = (inverse @ projected[:, index, None])[..., 0]
    losses = (weights.square() / inverse.diagonal(dim1=1, dim2=2)).sum(0)  # of removing each kept pair
    best: tuple[float, int, int] | None = None
    for position in losses.argsort().tolist():
        rest = kept[:position] + kept[position + 1 :]
        scores = _gains_of_adding(grams, projected, rest)
        scores[kept[position]] = float("-inf")
        gain = float(scores.max() - losses[position])
        if best is None or gain > best[0]:
            best = gain, kept[position], int(scores.argmax())
    return best[1:] if best is not None and best[0] > 0 else None


def _jittered(grams: Tensor) -> Tensor:
    scale = _JITTER * grams.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(grams.dtype).tiny
    return grams + scale[:, None, None] * torch.eye(grams.shape[-1], dtype=grams.dtype)


def choose_pairs(
    statistics: Statistics, d_qk: int | tuple[int, ...], scope: str = "head", rule: str = "gram"
) -> Pairs:
    """Kept pairs by layer, then by key-value head, with the nesting of `LatentConfig.channels`.

    Args:
        d_qk: key width, one number or one per layer.
        scope: who shares a set: "head" (each key-value head has its own), "layer" or "model".
        rule: "gram" (see `search`) or "energy" (see `strongest_pairs`).

    Raises:
        ValueError: an unknown scope or rule, or one table for layers of different widths.
    """
    if rule not in RULES:
        raise ValueError(f"unknown pair rule {rule!r}; choose one of {', '.join(RULES)}")
    if rule == "energy":
        return strongest_pairs([_energy(layer) for layer in statistics.layers], d_qk, scope)
    groups = groups_of(statistics)
    members = [list(relative_grams(layer).split(groups)) for layer in statistics.layers]
    return _per_set(members, d_qk, scope, torch.cat, lambda grams, number: search(grams, number)[0])


def strongest_pairs(energies: list[Tensor], d_qk: int | tuple[int, ...], scope: str = "head") -> Pairs:
    """Pairs of largest energy E|q_j|^2 E|k_j|^2 (MHA2MLA's 2-norm rule); as `choose_pairs`.

    Args:
        energies: [K, P] a layer, queries summed over the group.
    """
    return _per_set(
        [list(layer) for layer in energies],
        d_qk,
        scope,
        lambda parts: torch.stack(parts).sum(0),
        lambda energy, number: energy.argsort(descending=True)[:number].tolist(),
    )


def _per_set(
    members: list[list[Tensor]],
    d_qk: int | tuple[int, ...],
    scope: str,
    join: Callable[[list[Tensor]], Tensor],
    pick: Callable[[Tensor, int], list[int]],
) -> Pairs:
    """`pick` for every set of heads that share their pairs; `join` puts the statistics of several heads together."""
    if scope not in SCOPES:
        raise ValueError(f"unknown table scope {scope!r}; choose one of {', '.join(SCOPES)}")
    widths = [d_qk] * len(members) if isinstance(d_qk, int) else list(d_qk)
    if scope == "model":
        if len(set(widths)) > 1:
            raise ValueError(
                f"one rotary table for the model needs one key width: got d_qk from {min(widths)} to {max(widths)}; use "
                "--table layer or one width"
            )
        members, widths = [[join([head for layer in members for head in layer])]], widths[:1]
    elif scope == "layer":
        members = [[join(layer)] for layer in members]
    return tuple(
        tuple(tuple(sorted(pick(member, width // 2))) for member in layer)
        for layer, width in zip(members, widths, strict=True)
    )


def relative_grams(layer: LayerStatistics) -> Tensor:
    """Output Gram matrices over the layer's output energy, so that layers and heads can be added: [N, P, P]."""
    return layer.output_gram / layer.output_energy.clamp_min(torch.finfo(torch.float64).tiny)


def groups_of(statistics: Statistics) -> int:
    """Query heads per key-value head."""
    return statistics.num_heads // statistics.num_key_value_heads


def _energy(layer: LayerStatistics) -> Tensor:
    """E|q_j|^2 E|k_j|^2 of each key-value head, summed over its query heads: [K, P]."""
    return layer.query_energy.unflatten(0, (len(layer.key_energy), -1)).sum(1) * layer.key_energy


def key_errors(statistics: Statistics) -> Tensor:
    """First-order squared error of the attention output when every head keeps n pairs with gains: [L, P + 1].

    Along the greedy path, table per head; in the unit of `LayerStatistics.value_errors`.
    """
    rows = []
    for layer in statistics.layers:
        pairs = layer.gram.shape[-1]
        paths = [
            search(grams, pairs, exchange=False)[1]
            for grams in layer.output_gram.split(groups_of(statistics))
        ]
        rows.append(torch.tensor(paths, dtype=torch.float64).sum(0))
    return torch.stack(rows)


def scope_errors(statistics: Statistics, d_qk: int | tuple[int, ...]) -> dict[str, float]:
    """What each scope of the rotary table costs: relative squared error of the attention output, mean over layers.

    First order, with gains, before alignment. "model" is left out where layers differ in width.
    """
    widths = [d_qk] * len(statistics.layers) if isinstance(d_qk, int) else list(d_qk)
    layers = [relative_grams(layer) for layer in statistics.layers]
    prices = {}
    for scope in SCOPES if len(set(widths)) == 1 else SCOPES[:2]:
        if scope == "model":
            sets = [(torch.cat(layers), widths[0])]
        else:
            size = groups_of(statistics) if scope == "head" else statistics.num_heads
            sets = [(part, w) for grams, w in zip(layers, widths, strict=True) for part in grams.split(size)]
        prices[scope] = sum(search(grams, width // 2)[1][-1] for grams, width in sets) / len(widths)
    return prices
