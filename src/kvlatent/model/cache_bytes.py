"""Byte accounting of the key-value cache: shares and widths, what a live cache holds, and what fewer bytes are worth.

Decoding reads all weights once a step and the whole cache of each sequence, and does little arithmetic with either;
so bytes alone bound its speed. Nothing here knows a model: numbers go in, numbers come out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from kvlatent.model.widths import Width, width_per_layer

__all__ = [
    "attention_parameters",
    "cache_bytes",
    "check_share",
    "decode_speedup",
    "equal_widths",
    "layer_cache_bytes",
    "live_cache_bytes",
    "maximum_context",
    "share_at_least",
]


def equal_widths(kv: float, head_dim: int) -> int:
    """Largest multiple of 4 that, as both d_qk and d_vo, keeps at most the share `kv` of the original cache.

    Args:
        kv: share of the original cache to keep, in (0, 1].
        head_dim: original head width, channels.

    Raises:
        ValueError: the share is outside (0, 1] or too small for a width of 4.
    """
    check_share(kv)
    if kv == 1:
        return head_dim
    width = int(kv * head_dim + 1e-9) // 4 * 4
    if width == 0:
        raise ValueError(
            f"--kv {kv:g} of head_dim={head_dim} is less than the smallest width 4; "
            f"try {share_at_least(4 / head_dim):g} or more"
        )
    return width


def check_share(kv: float) -> None:
    """Raise `ValueError` unless `kv` lies in (0, 1]."""
    if not 0 < kv <= 1:
        raise ValueError(f"--kv is the share of the cache to keep and lies in (0, 1]: got {kv:g}; try 0.5")


def share_at_least(share: float) -> float:
    """`share` rounded up to four decimals, so that what an error suggests is enough."""
    return math.ceil(share * 1e4 - 1e-6) / 1e4


def live_cache_bytes(cache: Any) -> int:
    """Bytes held by the key and value tensors of a transformers `Cache`, as they are in memory now."""
    total = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
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


def maximum_context(
    memory_bytes: float,
    weight_bytes: float,
    layer_bytes: Sequence[float],
    windows: Sequence[int | None] | None = None,
    batch: int = 1,
) -> int | None:
    """Longest context, in tokens, at which weights and the caches of `batch` sequences fit into a memory.

    Activations and what the engine itself needs are not counted. None when no context is too long, because every
    layer has a window.

    Args:
        memory_bytes: of the device.
        weight_bytes: of the model.
        layer_bytes, windows: as for `cache_bytes`.
        batch: sequences of that length at once.

    Raises:
        ValueError: the weights alone do not fit.
    """
    if memory_bytes < weight_bytes:
        raise ValueError(
            f"the memory must hold the weights: got {_giga(memory_bytes)} for weights of {_giga(weight_bytes)}; "
            "give a larger memory, or weights with fewer bytes each"
        )
    room = (memory_bytes - weight_bytes) / batch
    windows = windows or [None] * len(layer_bytes)
    grows = sum(size for size, window in zip(layer_bytes, windows, strict=True) if window is None)
    if grows:
        limit = int(room / grows) + 1
    else:
        limit = max(window for window in windows if window is not None)
        if cache_bytes(limit, layer_bytes, windows) <= room:
            return None
    fits = bisect_right(
        range(limit + 1), room, key=lambda context: cache_bytes(context, layer_bytes, windows)
    )
    return fits - 1


def decode_speedup(
    weight_bytes: float, cache: float, new_weight_bytes: float, new_cache: float, batch: int = 1
) -> float:
    """How much faster a decoding step can get, by bytes read alone: (W + b C) / (W' + b C').

    A bound for large models on one device, not a measurement: arithmetic, launches and sampling are not counted.

    Args:
        weight_bytes, new_weight_bytes: read in one step, W and W'.
        cache, new_cache: bytes of one sequence's cache, C and C'.
        batch: sequences decoded together, b.
    """
    return (weight_bytes + batch * cache) / (new_weight_bytes + batch * new_cache)


def attention_parameters(
    hidden_size: int,
    num_heads: int,
    num_key_value_heads: int,
    d_qk: int,
    d_vo: int,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    projected: int | None = None,
) -> int:
    """Parameters of the four projections of one layer, biases included, QK-norms not.

    Args:
        hidden_size, num_heads, num_key_value_heads: of the model.
        d_qk, d_vo: widths per head.
        qkv_bias, o_bias: whether the projections have biases.
        projected: width at which queries and keys are projected and normalised before they are cut down to d_qk; a
            map of d_qk x projected per query head then comes on top.
    """
    width = d_qk if projected is None else projected
    rows = (num_heads + num_key_value_heads) * width + num_key_value_heads * d_vo
    total = rows * (hidden_size + qkv_bias) + hidden_size * (num_heads * d_vo + o_bias)
    return total if projected is None else total + num_heads * d_qk * projected


def _giga(size: float) -> str:
    return f"{size / 1e9:.4g} GB"
