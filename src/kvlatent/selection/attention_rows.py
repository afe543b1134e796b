"""Attention of sampled query rows, as calibration, alignment and fidelity look at it.

Shapes: B batch, T positions, R sampled rows, N query heads, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvlatent.model.layer_parts import rotary_of_decoder
from kvlatent.model.projection import Projected
from kvlatent.model.rotary import apply_rotary

__all__ = [
    "allowed",
    "document_ids",
    "masked_logits",
    "pair_layout",
    "recorded_projections",
    "rotary_by_position",
    "rotary_of",
    "row_logits",
    "seen_keys",
    "turned_logits",
]


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
    return seen_keys(document_ids(position_ids), rows, window)


def seen_keys(documents: Tensor, rows: Tensor, window: int | None) -> Tensor:
    """`allowed`, of what `document_ids` says."""
    keys = torch.arange(documents.shape[1], device=documents.device)
    seen = (keys <= rows[..., None]) & (documents[:, None] == documents.gather(1, rows)[..., None])
    return seen if window is None else seen & (rows[..., None] - keys < window)


_MASKED = -1e30


@contextmanager
def recorded_projections(attention: Any) -> Generator[list[Projected]]:
    """A list that gets what `attention.project` gives at every forward inside."""
    recorded: list[Projected] = []

    def project(hidden_states: Tensor) -> Projected:
        recorded.append(type(attention).project(attention, hidden_states))
        return recorded[-1]

    attention.project = project
    try:
        yield recorded
    finally:
        del attention.project


def rotary_of(attention: Any, decoder: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a layer at positions [B, T], each as if its block were alone.

    A table that goes by the length of what it is given (longrope) is asked block by block.
    """
    rotary = rotary_of_decoder(decoder) if attention.rotary is None else attention.rotary
    if not rotary.switches:
        return rotary(like, positions)
    turned = [rotary(like, positions[b, None]) for b in range(len(positions))]
    cos, sin = (torch.cat(parts) for parts in zip(*turned, strict=True))
    return cos, sin


def rotary_by_position(
    attention: Any, decoder: Any, like: Tensor, positions: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`rotary_of` as a function of positions, none beyond those that are given here; it looks them up.

    For those who ask at every step: cosines and sines are computed once.
    """
    rotary = rotary_of_decoder(decoder) if attention.rotary is None else attention.rotary
    if rotary.switches:
        return lambda some: rotary_of(attention, decoder, like, some)
    every = rotary(like, torch.arange(int(positions.max()) + 1, device=positions.device)[None])
    turned = [each[0] for each in every]  # [positions, rotary_dim], or [K, positions, rotary_dim]

    def look_up(some: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (t[some] if t.dim() == 2 else t[:, some].transpose(0, 1) for t in turned)
        return cos, sin

    return look_up


def row_logits(attention: Any, decoder: Any, normed: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Masked logits [B, N, R, T] in float32 of sampled query rows [B, R] of normed hidden states [B, T, D]."""
    cos, sin = rotary_of(attention, decoder, normed, positions)
    seen = allowed(positions, rows, attention.sliding_window)
    return turned_logits(attention, normed, rows, cos, sin, seen)


def turned_logits(
    attention: Any, normed: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, seen: Tensor
) -> Tensor:
    """`row_logits`, of what `rotary_of` and `allowed` give for the same blocks and rows."""
    index = rows[..., None]
    query = attention.project_one("q", normed.gather(1, index.expand(-1, -1, normed.shape[-1])))
    key = apply_rotary(attention.project_one("k", normed), cos, sin)
    if cos.dim() == 4:
        index = index[:, None].expand(-1, cos.shape[1], -1, -1)
    query = apply_rotary(
        query, *(t.gather(-2, index.expand(*index.shape[:-1], t.shape[-1])) for t in (cos, sin))
    )
    return masked_logits(attention, query, key, seen)


def masked_logits(attention: Any, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """Masked logits [B, N, R, T] in float32 of rotated queries [B, N, R, d], keys [B, K, T, d] and what is seen [B, R, T]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, K, G, R, d]
    with torch.autocast(query.device.type, enabled=False):
        logits = grouped.flatten(2, 3) * attention.scaling @ key.float().transpose(-1, -2)
    return logits.view(*query.shape[:3], -1).masked_fill(~seen[:, None], _MASKED)
