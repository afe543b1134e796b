"""Subset selection on Gram matrices: which channel pairs explain most of the logits, and the gain of each.

Scaling kept pair j by a_j (and dropping the others) leaves the error (1 - a)^T G (1 - a). Its minimum over gains that
vanish outside S is 1^T G 1 - b_S^T (G_SS)^-1 b_S with b = G 1, at a_S = (G_SS)^-1 b_S: choosing S is subset selection in
a least-squares problem, whose greedy step and exchange step have closed forms. Query heads keep gains of their own;
heads that share a set add up their errors.

Shapes: P channel pairs, M matrices that share one set.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["greedy_order", "kept_error", "pair_gains", "search"]

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
    kept, errors = _greedy(grams, projected, number)
    while exchange and 0 < number < grams.shape[-1]:
        exchange_pair = _best_exchange(grams, projected, kept)
        if exchange_pair is None:
            break
        swapped = [pair for pair in kept if pair != exchange_pair[0]] + [exchange_pair[1]]
        error = float(total - _explained(grams, projected, swapped))
        # The error itself must fall: its estimated change can be noise, and noise would exchange for ever.
        if not error < errors[-1] - _SMALLEST_GAIN * float(total):
            break
        kept, errors[-1] = swapped, error
    return sorted(kept), [max(error, 0.0) for error in errors]


def _greedy(grams: Tensor, projected: Tensor, number: int) -> tuple[list[int], list[float]]:
    """Pairs in the order of the greedy search, and the errors along it."""
    kept: list[int] = []
    errors = [float(projected.sum())]
    for _ in range(number):
        scores = _gains_of_adding(grams, projected, kept)
        kept.append(int(scores.argmax()))
        errors.append(errors[-1] - float(scores.max()))
    return kept, errors


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


def greedy_order(grams: Tensor) -> list[int]:
    """All pairs in the order in which the greedy search takes them."""
    grams = _jittered(grams)
    return _greedy(grams, grams.sum(-1), grams.shape[-1])[0]


def kept_error(grams: Tensor, kept: tuple[int, ...]) -> float:
    """Error, summed over the matrices, of keeping these pairs with the best gains."""
    grams = _jittered(grams)
    projected = grams.sum(-1)
    explained = float(_explained(grams, projected, list(kept))) if kept else 0.0
    return max(0.0, float(projected.sum()) - explained)
