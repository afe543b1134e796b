"""Which key channels survive, and which basis of the values: pure functions of indices and tensors.

Keys: `stride` (paper, equation 5) and `matched` (the channel pairs whose own frequencies form the frequency-aware
grid). Values: a plain slice (paper), or the singular vectors of the value-output product, which no rotation forbids.
Shapes: D model width, d head width, G query heads per key-value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "latent_rotary_dim",
    "matched_pairs",
    "nearest",
    "pairs_to_channels",
    "product_svd",
    "stride_channels",
    "stride_pairs",
]

_FLOOR = 1e-14  # of an eigenvalue of a Gram matrix, relative to the largest: float64 leaves noise below


def latent_rotary_dim(head_dim: int, rotary_dim: int, d_qk: int) -> int:
    """Rotated channels at width `d_qk`: rotated and pass-through parts shrink in proportion.

    Raises:
        ValueError: the proportion is not an even whole number of rotated channels.
    """
    exact = d_qk * rotary_dim / head_dim
    if exact != int(exact) or int(exact) % 2:
        fits = [d for d in range(2, head_dim + 1, 2) if (d * rotary_dim) % (2 * head_dim) == 0]
        raise ValueError(
            f"rotated channels must shrink in proportion to an even number: d_qk={d_qk} of head_dim={head_dim} with "
            f"{rotary_dim} rotated gives {exact:g}; {nearest(d_qk, fits)}"
        )
    return int(exact)


def nearest(width: int, allowed: list[int]) -> str:
    """`try 16 or 32`: the allowed widths next to `width` on either side."""
    below = [d for d in allowed if d < width]
    above = [d for d in allowed if d > width]
    return "try " + " or ".join(
        str(d) for d in ([max(below)] if below else []) + ([min(above)] if above else [])
    )


def stride_channels(name: str, width: int, size: int, multiple: int = 1) -> tuple[int, ...]:
    """Every (size / width)-th of `size` channels (paper, equation 5).

    `name` appears in the error, which names the nearest widths that are a `multiple` of what else is needed.

    Raises:
        ValueError: `size` is not divisible by `width`.
    """
    if size % width:
        divisors = [d for d in range(multiple, size + 1, multiple) if size % d == 0]
        raise ValueError(
            f"uniform stride needs head_dim divisible by {name}: got {name}={width}, head_dim={size}; "
            f"{nearest(width, divisors)}"
        )
    return tuple(range(0, size, size // width))


def stride_pairs(num_pairs: int, kept: int) -> tuple[int, ...]:
    """Every (num_pairs / kept)-th rotary pair."""
    return tuple(range(0, num_pairs, num_pairs // kept))


def matched_pairs(head_dim: int, d_qk: int, rotary_dim: int, kept_rotary_dim: int) -> tuple[int, ...]:
    """Original pairs whose frequencies are exactly the frequency-aware table at `kept_rotary_dim`.

    With r = D / d over the rotated widths D, d: pairs D/8 + r m for m < d/4, then 3D/8 + (r/2)(m - d/4).

    Raises:
        ValueError: the ratio is odd or the indices are not whole numbers.
    """
    size, kept = rotary_dim, kept_rotary_dim

    def fits(width: int) -> bool:
        return width % 4 == 0 and size % (2 * width) == 0 and size % 8 == 0

    if not fits(kept):
        proportional = [d for d in range(2, head_dim + 1, 2) if d * rotary_dim % head_dim == 0]
        allowed = [d for d in proportional if fits(d * rotary_dim // head_dim)]
        hint = nearest(d_qk, allowed) if allowed else "use keys=stride"
        raise ValueError(
            f"matched pairs need head_dim / d_qk even and whole pair indices: got d_qk={d_qk}, head_dim={head_dim} "
            f"({kept} of {size} rotated); {hint}"
        )
    ratio = size // kept
    coarse = [size // 8 + ratio * m for m in range(kept // 4)]
    fine = [3 * size // 8 + ratio // 2 * m for m in range(kept // 4)]
    return tuple(coarse + fine)


def pairs_to_channels(
    pairs: tuple[int, ...], rotary_dim: int, head_dim: int | None = None
) -> tuple[int, ...]:
    """Channels of half-split pairs: first halves, then second halves.

    Pairs from rotary_dim / 2 on are those of the channels of `head_dim` that no rotation touches, paired the same way.
    """
    half, passed = rotary_dim // 2, ((head_dim or rotary_dim) - rotary_dim) // 2
    first = tuple(pair if pair < half else rotary_dim + pair - half for pair in pairs)
    second = tuple(f + (half if pair < half else passed) for f, pair in zip(first, pairs, strict=True))
    return first + second


def product_svd(
    w_v: Tensor, b_v: Tensor | None, w_o: Tensor, d_vo: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Best rank-d_vo value and output weights of one key-value head, in the Frobenius norm of their product.

    W_O W_V = U S V^T, so W_V' = S^1/2 V^T and W_O' = U S^1/2 (Eckart-Young). Values carry no rotation, so unlike for
    keys this is legal under RoPE. The roots of both Gram matrices reduce it to a d x d problem, solved in float64: of
    directions below 1e-7 of the strongest nothing is left, which is what float32 holds.

    Args:
        w_v: [d, D]; b_v: [d] or None; w_o: [G * D, d], the output blocks of the group's query heads, stacked.

    Returns:
        W_V' [d_vo, D], b_V' [d_vo] or None, W_O' [G * D, d_vo], in float64.
    """
    w_v, w_o = w_v.double(), w_o.double()
    root_v, inverse_v = _gram_root(w_v @ w_v.T)
    root_o, inverse_o = _gram_root(w_o.T @ w_o)
    u, s, vh = torch.linalg.svd(root_o @ root_v.T)
    root = s[:d_vo].sqrt()
    kept = (root[:, None] * vh[:d_vo]) @ inverse_v
    return (
        kept @ w_v,
        None if b_v is None else kept @ b_v.double(),
        w_o @ (inverse_o.T @ (u[:, :d_vo] * root)),
    )


def _gram_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = gram [d, d], and R^-T, which is 0 in directions that are not there."""
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp_min(0).sqrt()
    there = values > values[-1] * _FLOOR
    return roots[:, None] * vectors.T, torch.where(there, 1 / roots, 0.0)[:, None] * vectors.T
