"""Byte accounting of the key-value cache: what it holds a token, at a context, and in memory now.

Nothing here knows a model: numbers go in, numbers come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlatent.model.widths import Width, width_per_layer

__all__ = ["cache_bytes", "layer_cache_bytes", "live_cache_bytes"]


def live_cache_bytes(cache: Any) -> int:
    """Bytes held by the key and value tensors of a transformers `Cache`, as they are in memory now.

    What layers without attention keep (states of a fixed size) does not count.
    """
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                total += tensor.numel() * tensor.element_size()
    return total


def layer_cache_bytes(
    d_qk: Width,
    d_vo: Width,
    num_layers: int,
    num_key_value_heads: int,
    element_size: float,
) -> tuple[float, ...]:
    """Bytes to store one token of one sequence in each layer: kv_heads x (d_qk + d_vo) x element size.

    Args:
        d_qk, d_vo: widths in channels, one number or one per layer.
        num_layers, num_key_value_heads: of the model.
        element_size: bytes of one stored number; 0.5 for four bits.
    """
    keys, values = width_per_layer(d_qk, num_layers), width_per_layer(d_vo, num_layers)
    return tuple(num_key_value_heads * (k + v) * element_size for k, v in zip(keys, values, strict=True))


def cache_bytes(
    context: int, layer_bytes: Sequence[float], windows: Sequence[int | None] | None = None
) -> float:
    """Bytes of one sequence's cache at a context of so many tokens; a layer with a window holds no more than that.

    Args:
        context: tokens.
        layer_bytes: bytes per token of each layer, from `layer_cache_bytes`.
        windows: of each layer in tokens, None for full attention; left out, no layer has one.
    """
    if windows is None:
        return context * sum(layer_bytes)
    return sum(
        size * (context if window is None else min(context, window))
        for size, window in zip(layer_bytes, windows, strict=True)
    )
