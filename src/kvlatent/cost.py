"""Byte accounting of the key-value cache: what a share of it means in widths, and what a live cache holds."""

from __future__ import annotations

from typing import Any

__all__ = ["equal_widths", "live_cache_bytes"]


def equal_widths(kv: float, head_dim: int) -> int:
    """Largest multiple of 4 that, as both d_qk and d_vo, keeps at most the share `kv` of the original cache.

    Args:
        kv: share of the original cache to keep, in (0, 1].
        head_dim: original head width, channels.

    Raises:
        ValueError: the share is outside (0, 1] or too small for a width of 4.
    """
    if not 0 < kv <= 1:
        raise ValueError(f"--kv is the share of the cache to keep and lies in (0, 1]: got {kv:g}; try 0.5")
    if kv == 1:
        return head_dim
    width = int(kv * head_dim + 1e-9) // 4 * 4
    if width == 0:
        raise ValueError(
            f"--kv {kv:g} of head_dim={head_dim} is less than the smallest width 4; try {4 / head_dim:g} or more"
        )
    return width


def live_cache_bytes(cache: Any) -> int:
    """Bytes held by the key and value tensors of a transformers `Cache`, as they are in memory now."""
    total = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                total += tensor.numel() * tensor.element_size()
    return total
