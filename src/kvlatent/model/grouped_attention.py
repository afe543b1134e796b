"""Attention of one query against the cache on a CPU: the queries of a group share their keys and values.

Adding a token is a read of the cache. torch's own attention reads more there: it repeats keys and values for every query
of a group, or falls to its math path, which copies them in float32. Two batched products read each once.

Shapes: B batch, S cached positions, N query heads, K key-value heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["adds_one_token", "grouped_attention"]


def adds_one_token(query: Tensor) -> bool:
    """Whether `query` [B, N, T, d_qk] is one token on a CPU, computed now: what a compiler or a tracer sees stays torch's."""
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return query.device.type == "cpu" and not is_recorded and query.shape[2] == 1


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface for one query: [B, N, 1, d_qk] against keys [B, K, S, d_qk] and values [B, K, S, d_vo].

    Scores and sums are rounded to the cache's type, as in transformers' eager attention; the softmax is float32.

    Args:
        attention_mask: [B or 1, N or 1, 1, S or more]: true where a position is seen, or numbers to add; or None.

    Returns:
        [B, 1, N, d_vo], and None for the weights.
    """
    batch, heads, _, d_qk = query.shape
    groups = heads // key.shape[1]
    grouped = query.reshape(batch, -1, groups, d_qk)
    # Keys on the left: with few queries that product reads them as they lie.
    scores = (key @ grouped.mT).mT.contiguous().float() * (d_qk**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        if mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], -1, groups, mask.shape[-1])
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout, training=module.training)
    return (weights.to(value.dtype) @ value).reshape(batch, 1, heads, -1), None
