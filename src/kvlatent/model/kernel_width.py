"""What attention kernels ask for that a latent layer is not: one width for queries, keys and values, and a backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["kernel_width", "refuse_flex_training"]


def kernel_width(
    config: Any, d_qk: int, d_vo: int, query: Tensor, *, is_paged: bool, cache_width: int | None = None
) -> int | None:
    """Common width to zero-pad queries, keys and values to for one call, or None.

    Zero channels change neither scores nor kept outputs. Needed by paged caches (one head size for the model, or in
    vLLM one for keys and values of a layer), by flash attention, and by torch's fused CPU kernel: without it, prefill
    on a CPU falls to the math path, which holds all scores and ran 4x slower at 2,048 tokens. Decoding and the cache
    stay unpadded.

    Args:
        config: the latent transformers config; d_qk, d_vo: widths of the layer.
        query: [B, N, T, d_qk]; is_paged: the cache is; cache_width: of the layer in vLLM's cache, where it says so.
    """
    implementation = config._attn_implementation
    if is_paged or implementation == "vllm":
        width = cache_width or config.head_dim
        return None if d_qk == d_vo == width else width
    if d_qk == d_vo:
        return None
    on_cpu = implementation in ("sdpa", "kvlatent") and query.device.type == "cpu" and query.shape[2] > 1
    return max(d_qk, d_vo) if on_cpu or "flash" in implementation else None


def refuse_flex_training(config: Any, query: Tensor) -> None:
    """Raise `ValueError` for training with flex attention on a CPU, which has no backward there."""
    if config._attn_implementation != "flex_attention" or query.device.type != "cpu":
        return
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            "flex attention has no backward pass on a CPU: train with attn_implementation='sdpa' or 'eager', or "
            "run under torch.no_grad()"
        )
