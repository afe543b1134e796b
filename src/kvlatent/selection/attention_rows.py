"""Attention of sampled query rows, as calibration, alignment and fidelity look at it.

Shapes: B batch, T positions, R sampled rows, N query heads, K key-value heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvlatent.model.rotary import apply_rotary

__all__ = ["allowed", "document_ids", "pair_layout", "row_logits"]


def pair_layout(x: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the channel pairs of `x` ([..., d]): rotated pairs, then those that pass through."""
    half, size = rotary_dim // 2, x.shape[-1]
    middle = rotary_dim + (size - rotary_dim) // 2
    if rotary_dim == size:
        return x[..., :half], x[..., half:]
    first = torch.cat([x[..., :half], x[..., rotary_dim:middle]], dim=-1)
    return first, torch.cat([x[..., half:rotary_dim], x[..., middle:]], dim=-1)


def document_ids(position_ids: Tensor) -> Tensor:
    """Number of the document of every position: [B, T] -> [B, T]; a document starts where positions restart."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts.cumsum(1)


def allowed(position_ids: Tensor, rows: Tensor, window: int | None) -> Tensor:
    """Which keys each sampled query sees: causal, same document, inside the window.

    Args:
        position_ids: [B, T]; rows: [B, R], indices into T; window: of sliding attention, tokens, or None.

    Returns:
        [B, R, T], bool.
    """
    documents = document_ids(position_ids)
    keys = torch.arange(position_ids.shape[1], device=position_ids.device)
    seen = (keys <= rows[..., None]) & (documents[:, None] == documents.gather(1, rows)[..., None])
    return seen if window is None else seen & (rows[..., None] - keys < window)


_MASKED = -1e30


def row_logits(
    attention: Any, decoder: Any, normed: Tensor, positions: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Masked logits [B, N, R, T] in float32 of sampled query rows [B, R], and the values [B, K, T, d_vo]."""
    query, key, value = attention.project(normed)
    rotary = decoder.rotary_emb if attention.rotary is None else attention.rotary
    # A block at a time: longrope chooses its table by the length of what it is given.
    turned = [rotary(normed[b, None], positions[b, None]) for b in range(len(normed))]
    cos, sin = (torch.cat(parts) for parts in zip(*turned, strict=True))
    query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ key.transpose(-1, -2)).float() * attention.scaling
    seen = allowed(positions, rows, attention.sliding_window)
    return logits.masked_fill(~seen[:, None], _MASKED), value
