"""Values at low width: which d_vo directions of each key-value head to keep, given what attention averages.

A value head may be turned freely, since no rotation is applied to it: keep P v (P is d_vo x d) and read it out with
new output weights. The statistics are second moments A_h = E[y y^T] of the attention-averaged values y of each query
head; the error of the attention output is then a trace, and its minimum an eigenproblem.

Shapes: D model width, d head width, N query heads, K key-value heads, G = N / K.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "best_outputs",
    "gated_metric",
    "metric_root",
    "ordered_directions",
    "output_error",
    "value_basis",
    "value_errors",
]

_FLOOR = 1e-10  # relative to the largest eigenvalue
_SHRINK = 1e-6
_TINY = 1e-30  # stands for the mean of a head that is 0 everywhere, far enough above the smallest number to divide by


def gated_metric(metric: Tensor, gates: Tensor) -> Tensor:
    """What an error of averaged values costs behind the output gate and W_O: E (W_O s)^T (W_O s), [N, d, d].

    Args:
        metric: W_O^T W_O, [N, d, d]; gates: second moments of the gates s [N, d, d], empty where there are none. They are
            taken to be independent of the values.
    """
    return metric * gates if gates.numel() else metric


def metric_root(metric: Tensor) -> Tensor:
    """R [N, d, d] with R^T R = metric, in the place of output weights."""
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp_min(0).sqrt()[..., None] * vectors.transpose(1, 2)


def value_basis(w_o: Tensor, moments: Tensor, d_vo: int) -> Tensor:
    """Directions P [d_vo, d] (orthonormal rows) of one key-value head that lose least of the attention output.

    For one query head per key-value head, in closed form: with B = W_O^T W_O, the leading eigenvectors of
    B^1/2 A B^1/2 = Q L Q^T give P = Q_r^T B^1/2. For a group that is the start (B summed, A averaged) of a descent
    (L-BFGS on d x d matrices) on sum_h tr B_h (A_h - A_h P^T (P A_h P^T)^-1 P A_h).

    Args:
        w_o: [G, D, d], output weights of the group's query heads, float64.
        moments: [G, d, d], their A_h.
        d_vo: directions to keep, 0 < d_vo <= d.
    """
    basis = ordered_directions(w_o, moments)[:d_vo]
    if len(w_o) > 1 and d_vo < w_o.shape[-1]:
        basis = _descend(basis, w_o.transpose(1, 2) @ w_o, _shrunk(moments))
    return torch.linalg.qr(basis.T).Q.T.contiguous()


def best_outputs(w_o: Tensor, moments: Tensor, basis: Tensor) -> Tensor:
    """Output weights [G, D, d_vo] that read kept values best: W_O A P^T (P A P^T)^-1, head by head."""
    moments = _shrunk(moments)
    kept = moments @ basis.T  # [G, d, d_vo]
    return torch.linalg.solve(basis @ kept, (w_o @ kept).transpose(1, 2)).transpose(1, 2)


def output_error(basis: Tensor, metrics: Tensor, moments: Tensor) -> Tensor:
    """Squared error of the attention output: sum over heads of tr B_h (A_h - A_h P^T (P A_h P^T)^-1 P A_h)."""
    kept = moments @ basis.T
    explained = torch.linalg.solve(basis @ kept, kept.transpose(1, 2) @ metrics @ kept)
    return ((metrics * moments).sum() - explained.diagonal(dim1=-2, dim2=-1).sum()).clamp_min(0)


def value_errors(w_o: Tensor, moments: Tensor, groups: int) -> Tensor:
    """`output_error` for every width 0 ... d, summed over the key-value heads, from the closed-form start: [d + 1].

    Args:
        w_o: [N, D, d]; moments: [N, d, d]; groups: G.
    """
    size = w_o.shape[-1]
    errors = w_o.new_zeros(size + 1)
    for heads, seconds in zip(w_o.split(groups), moments.split(groups), strict=True):
        metrics = heads.transpose(1, 2) @ heads
        basis, seconds = ordered_directions(heads, seconds), _shrunk(seconds)
        errors[0] += (metrics * seconds).sum()
        for width in range(1, size):
            rows = torch.linalg.qr(basis[:width].T).Q.T
            errors[width] += output_error(rows, metrics, seconds)
    return errors


def ordered_directions(w_o: Tensor, moments: Tensor) -> Tensor:
    """All d directions of the closed form, most important first: [d, d]."""
    values, vectors = torch.linalg.eigh((w_o.transpose(1, 2) @ w_o).sum(0))
    root = (vectors * values.clamp_min(values.max() * _FLOOR).sqrt()) @ vectors.T
    inner = torch.linalg.eigh(root @ moments.mean(0) @ root).eigenvectors.flip(1)
    return inner.T @ root


def _shrunk(moments: Tensor) -> Tensor:
    """Moments with a little of their mean on the diagonal, so that they can be inverted."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
    return moments + _SHRINK * mean[:, None, None] * torch.eye(
        moments.shape[-1], dtype=moments.dtype, device=moments.device
    )


def _descend(start: Tensor, metrics: Tensor, moments: Tensor) -> Tensor:
    """The start or what L-BFGS makes of it, whichever has the smaller error."""
    with torch.enable_grad():
        basis = torch.linalg.qr(start.T).Q.T.clone().requires_grad_(True)
        scale = (metrics * moments).sum().clamp_min(torch.finfo(moments.dtype).tiny)
        before = float(output_error(basis.detach(), metrics, moments))
        optimiser = torch.optim.LBFGS(
            [basis], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-12
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = output_error(basis, metrics, moments) / scale
            loss.backward()
            return loss

        optimiser.step(closure)
    descended = basis.detach()
    after = float(output_error(descended, metrics, moments))
    return descended if after < before else start
