"""Keys and values at their own widths in vLLM, through its Triton backend that stores them side by side.

NOT RUN: that backend needs a GPU, and no GPU with vLLM was at hand. What is tested is everything up to its kernel: the
arguments of each layer, the bytes they ask for, and that unpadded queries, keys and values reach it. It is used on request
(`vllm serve DIR --attention-backend TRITON_ATTN_DIFFKV`), and the self-check at the start says whether it is right.
`FLASH_ATTN_DIFFKV` is left out: in vLLM 0.32 it refuses values that are wider than keys.

Shapes: B = 1, N query heads, K key-value heads, T positions.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from kvlatent.model.config import LatentConfig
from kvlatent.model.widths import width_per_layer

__all__ = ["BACKEND", "INTERFACE", "attend", "check_diffkv", "layer_arguments"]

BACKEND = "TRITON_ATTN_DIFFKV"
INTERFACE = "kvlatent_diffkv"
"""Name of `attend` in transformers' attention interface; vLLM's own pads values to the width of keys."""
_SMALLEST = 32


def check_diffkv(latent: LatentConfig, num_layers: int, device: str) -> None:
    """Refuse devices and widths that the backend does not take.

    Raises:
        ValueError: there is no GPU; values differ in width between layers (it keeps one width of values a process), or a width is below
            what its kernel takes.
    """
    if device == "cpu":
        raise ValueError(
            f"{BACKEND} needs a GPU: got device {device}; leave --attention-backend out, which pads the cache"
        )
    values = set(width_per_layer(latent.d_vo))
    if len(values) > 1:
        raise ValueError(
            f"{BACKEND} takes one width of values for all layers: got d_vo from {min(values)} to {max(values)}; leave "
            "--attention-backend out, which pads the cache"
        )
    smallest = min(min(latent.widths_at(layer)) for layer in range(num_layers))
    if smallest < _SMALLEST:
        raise ValueError(
            f"{BACKEND} takes widths of at least {_SMALLEST}: got {smallest}; leave --attention-backend out, which pads the "
            "cache"
        )


def layer_arguments(latent: LatentConfig, prefix: str) -> dict[str, int]:
    """The widths of one of vLLM's attention layers, whose name ends in "layers.3.self_attn.attn" or the like."""
    (layer,) = re.findall(r"\.layers\.(\d+)\.", f".{prefix}")
    d_qk, d_vo = latent.widths_at(int(layer))
    return {"head_size": d_qk, "head_size_v": d_vo}


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention by vLLM's layer on `module`, nothing padded: [T, N x d_vo].

    Args:
        module: its `attn` is the layer.
        query: [1, N, T, d_qk]; key: [1, K, T, d_qk]; value: [1, K, T, d_vo].
        attention_mask: not used, vLLM masks by its metadata.
    """
    length = query.shape[2]
    flat = (x.transpose(1, 2).reshape(length, -1) for x in (query, key, value))
    return module.attn(*flat), None
