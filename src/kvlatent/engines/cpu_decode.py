"""The attention implementation "kvlatent": torch's, and for one token on a CPU a kernel that reads the cache once.

`model.set_attn_implementation("kvlatent")` works for latent models and for their originals. The kernel
(`cpu_decode.cpp`) is compiled at first use; where there is no compiler a warning says so and the grouped products
of `model/grouped_attention` take its place.

Shapes: B batch, S cached positions, N query heads, K key-value heads.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvlatent.engines.native_code import NoNativeCode, load_native
from kvlatent.model.grouped_attention import adds_one_token, grouped_attention

__all__ = ["IMPLEMENTATION", "decode_attention", "kernel", "register_cpu_decode"]

IMPLEMENTATION = "kvlatent"
_KERNEL = Path(__file__).with_name("cpu_decode.cpp")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Call(ctypes.Structure):
    """`Call` of the C++ file, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "group", "length", "d_qk", "d_vo")),
        *((name, ctypes.c_int64 * 3) for name in ("key_strides", "value_strides")),
        ("mask_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def register_cpu_decode() -> None:
    """Make `attn_implementation="kvlatent"` known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])


@cache
def kernel() -> Any | None:
    """The compiled function; None, after a warning, where it cannot be compiled."""
    try:
        function = load_native(_KERNEL).decode_attention
    except NoNativeCode as error:
        warnings.warn(
            f"attn_implementation={IMPLEMENTATION!r} runs on torch's products instead of its own kernel, at about half "
            f"its speed: {error}",
            stacklevel=2,
        )
        return None
    function.argtypes = (ctypes.POINTER(_Call), ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    function.restype = None
    return function


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: see the module's text."""
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, **kwargs}
    if not adds_one_token(query) or kwargs.get("cache") is not None:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    mask = _seen(attention_mask, key.shape[2])
    fits = mask is not None or attention_mask is None
    if not fits or needs_gradient or dropout > 0 or not _readable(query, key, value) or kernel() is None:
        return grouped_attention(module, query, key, value, attention_mask, **options)
    return decode_attention(query, key, value, mask, scaling).transpose(1, 2), None


def _seen(mask: Tensor | None, length: int) -> Tensor | None:
    """[B or 1, S], true where a position is seen; None for a mask that heads do not share, or of numbers to add."""
    if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    return mask[:, 0, 0, :length]


def _readable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel can read the cache where it lies."""
    same_type = query.dtype == key.dtype == value.dtype
    return key.dtype in _TYPES and same_type and key.stride(-1) == value.stride(-1) == 1


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Attention of one query by the compiled kernel; float32 inside, whatever the type of the cache.

    Args:
        query: [B, N, 1, d_qk], of the cache's type.
        key: [B, K, S, d_qk], float32 or bfloat16, rows contiguous.
        value: [B, K, S, d_vo], of the same type.
        seen: [B or 1, S], true where a position is seen; None for all.
        scaling: of the scores; left out, d_qk^-1/2.

    Returns:
        [B, N, 1, d_vo] in the query's type; zeros where nothing is seen.
    """
    batch, heads, _, d_qk = query.shape
    length, d_vo = key.shape[2], value.shape[-1]
    asked = query.float().contiguous()
    out = torch.empty(batch, heads, 1, d_vo)
    if seen is not None:
        seen = seen.expand(batch, -1).contiguous()
    call = _Call(
        *(tensor.data_ptr() for tensor in (asked, key, value)),
        None if seen is None else seen.data_ptr(),
        out.data_ptr(),
        *(key.shape[1], heads // key.shape[1], length, d_qk, d_vo),
        (ctypes.c_int64 * 3)(*key.stride()[:3]),
        (ctypes.c_int64 * 3)(*value.stride()[:3]),
        length,
        d_qk**-0.5 if scaling is None else scaling,
    )
    function = kernel()
    assert function is not None, "asked before the call"
    function(ctypes.byref(call), batch, _TYPES[key.dtype], torch.get_num_threads())
    return out.to(query.dtype)
