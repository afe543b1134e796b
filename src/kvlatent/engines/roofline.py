"""What fewer cache bytes are worth on one device: the longest context that fits, and a bound on decoding speed.

Decoding reads all weights once a step and the whole cache of each sequence, and does little arithmetic with either;
so bytes alone bound its speed. Nothing here knows a model: numbers go in, numbers come out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from kvlatent.model.cache_bytes import cache_bytes

__all__ = ["attention_parameters", "decode_speedup", "maximum_context"]


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
