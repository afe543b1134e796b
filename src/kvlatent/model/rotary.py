"""Rotary position embedding at low width: frequency formulas, tables to tensors, and the attenuation curve.

The layout is the half-split one of GPT-NeoX and Hugging Face: channel j pairs with channel j + rotary_dim / 2
(paper, appendix C, equation 14). Shapes: B batch, T positions, H heads, K key-value heads, P = rotary_dim / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvlatent.model.table import RotaryTable

__all__ = [
    "LatentRotary",
    "apply_rotary",
    "attenuation",
    "frequency_aware_exponents",
    "frequency_aware_table",
    "standard_exponents",
]


def standard_exponents(rotary_dim: int) -> tuple[float, ...]:
    """Exponents e of inv_freq = theta^-e in plain RoPE: 0, 2/d, ..., 1 - 2/d (paper, section 3.1)."""
    return tuple(2 * j / rotary_dim for j in range(rotary_dim // 2))


def frequency_aware_exponents(rotary_dim: int) -> tuple[float, ...]:
    """Exponents of the frequency-aware table (paper, section 3.3 and appendix D.2).

    0.25, 0.25 + 2/d, ..., 0.75 - 2/d, then 0.75, 0.75 + 1/d, ..., 1 - 1/d: the top quarter of the frequencies is
    dropped, the lowest quarter is sampled twice as densely. Equation 11 as printed runs its second branch from 1.0
    on; appendix D.2 and the authors' code restart the index there, and so do we.

    Raises:
        ValueError: `rotary_dim` is not divisible by 4.
    """
    if rotary_dim % 4:
        below = rotary_dim - rotary_dim % 4
        fitting = " or ".join(str(width) for width in (below, below + 4) if width)
        raise ValueError(
            f"the frequency-aware table needs a rotated width divisible by 4: got {rotary_dim}; try {fitting}"
        )
    coarse = tuple(0.25 + 2 * j / rotary_dim for j in range(rotary_dim // 4))
    fine = tuple(0.75 + j / rotary_dim for j in range(rotary_dim // 4))
    return coarse + fine


def frequency_aware_table(original: RotaryTable, rotary_dim: int, theta: float) -> RotaryTable:
    """The paper's table at `rotary_dim` channels for a model whose effective table is `original`.

    A scaled model (llama3, yarn, longrope) turns pair j at a multiple of theta^(-2j/D); that multiple, interpolated
    at the new exponents, is applied to theta^-e. For a plain model it is 1 and the table is the paper's.
    """
    exponents = frequency_aware_exponents(rotary_dim)

    def rescaled(table: tuple[float, ...]) -> tuple[float, ...]:
        plain = [theta**-e for e in standard_exponents(original.rotary_dim)]
        ratios = [actual / ideal for actual, ideal in zip(table, plain, strict=True)]
        if all(math.isclose(ratio, 1.0, rel_tol=1e-5) for ratio in ratios):
            return tuple(theta**-e for e in exponents)
        return tuple(theta**-e * _interpolate(ratios, e * len(ratios)) for e in exponents)

    long = None if original.long is None else rescaled(original.long)
    return RotaryTable(rescaled(original.short), long, original.switch, original.attention_factor)


def _interpolate(values: list[float], position: float) -> float:
    """Linear interpolation of `values` at a fractional index, constant beyond the end."""
    low = min(int(position), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def attenuation(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Mean similarity of a vector to itself at a distance: mean over pairs of cos(x inv_freq) (equation 10 / d).

    Args:
        inv_freq: [P]; positions: [X], in tokens.

    Returns:
        [X] in float64; the paper's curve is d times this.
    """
    return torch.cos(positions.double()[:, None] * inv_freq.double()).mean(-1)


class LatentRotary(nn.Module):
    """Cosines and sines of stored rotary tables, one for all heads or one per key-value head.

    It owns no parameter and no buffer: the fp32 tensors are built at the first forward on each device. Its name
    avoids "RotaryEmbedding", which transformers would re-initialise at load.

    Args:
        tables: none where every layer has its own.
        in_float32: cosines and sines are not rounded to the type of what they turn.
    """

    def __init__(self, tables: tuple[RotaryTable, ...], *, in_float32: bool = False) -> None:
        super().__init__()
        self.tables, self.in_float32 = tables, in_float32
        self._on_device: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    @property
    def switches(self) -> bool:
        """Whether the table goes by the longest of the sequences that are given together (longrope)."""
        return any(table.long is not None for table in self.tables)

    def inv_freq(self, device: torch.device, length: Tensor) -> Tensor:
        """Frequencies for sequences of `length` tokens (a scalar tensor): [P], or [K, 1, P] for tables per head."""
        if device not in self._on_device:
            self._on_device[device] = self._build(device)
        short, long = self._on_device[device]
        switch = self.tables[0].switch
        return short if long is None or switch is None else torch.where(length > switch, long, short)

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        def stacked(rows: list[tuple[float, ...]]) -> Tensor:
            tensor = torch.tensor(rows, dtype=torch.float32, device=device)
            return tensor[0] if len(rows) == 1 else tensor[:, None, :]

        long = [table.long for table in self.tables if table.long is not None]
        return stacked([table.short for table in self.tables]), stacked(long) if long else None

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Cosine and sine in x's dtype: [B, T, rotary_dim], or [B, K, T, rotary_dim] for tables per head.

        The same arithmetic, in the same order, as transformers' rotary modules, so that an unchanged table gives
        unchanged bits. The positions themselves where there is no table at this level: each layer then has its own, and not
        every decoder tells its layers their positions otherwise. `layer_type` is upstream's, where it has a table a type.
        """
        if not self.tables:
            return position_ids
        if position_ids.dim() == 3:  # time, height and width: of text they are one
            position_ids = position_ids[0]
        inv_freq = self.inv_freq(x.device, position_ids.max() + 1)
        positions = position_ids[..., None].float()
        freqs = (positions if inv_freq.dim() == 1 else positions[:, None]) * inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)
        factor = self.tables[0].attention_factor
        dtype = torch.float32 if self.in_float32 else x.dtype
        return (emb.cos() * factor).to(dtype), (emb.sin() * factor).to(dtype)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim channels of `x`, pass the rest through; in x's dtype.

    Args:
        x: [B, H, T, d]; cos, sin: [B, T, rotary_dim], or [B, K, T, rotary_dim] with K dividing H (each table serves
            the H / K query heads of its group).
    """
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    elif cos.shape[1] != x.shape[1]:
        groups = x.shape[1] // cos.shape[1]
        cos, sin = cos.repeat_interleave(groups, dim=1), sin.repeat_interleave(groups, dim=1)
    rotary_dim = cos.shape[-1]
    if rotary_dim == 0:
        return x
    if rotary_dim == x.shape[-1]:
        return ((x * cos) + (_rotate_half(x) * sin)).to(x.dtype)
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = (rotated * cos) + (_rotate_half(rotated) * sin)
    return torch.cat([turned.to(x.dtype), passed], dim=-1)
