"""The caches that a bench compares: transformers' plain ones, and its quantised ones as the rival of narrower heads.

A quantised cache shares one scale and one shift among a group of neighbouring numbers. Its groups run over
[kv_heads, tokens, width] of a sequence, whatever the number of tokens; so their size must divide kv_heads x width.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from math import gcd
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, QuantizedCache, StaticCache

from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of, family_of, head_dim_of, key_value_heads_of

__all__ = [
    "CACHES",
    "PACKAGES",
    "cached_widths",
    "check_caches",
    "group_size",
    "make_cache",
    "working_caches",
]

CACHES: dict[str, tuple[str, int] | None] = {
    "dynamic": None,
    "static": None,
    "quantized-int4": ("quanto", 4),
    "quantized-int2": ("quanto", 2),
    "quantized-fp8": ("fp8", 8),
    "quantized-int8-hqq": ("hqq", 8),
    "quantized-int4-hqq": ("hqq", 4),
    "quantized-int2-hqq": ("hqq", 2),
}
"""Kinds of cache: None for unquantised ones, else transformers' backend and bits a number."""

_DEFAULT_CACHES = ("dynamic", "quantized-int4")
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
_GROUP, _SMALLEST_GROUP = 64, 8


def cached_widths(config: PretrainedConfig) -> list[tuple[int, int]]:
    """(d_qk, d_vo) of every layer with attention of an original or latent model's config."""
    layers = attention_layers_of(config)
    if getattr(config, "kv_latent", None):
        latent = latent_config_of(config)
        return [(latent.d_qk_at(layer), latent.d_vo_at(layer)) for layer in layers]
    width = head_dim_of(config)
    return [(width, width) for _ in layers]


def group_size(kind: str, config: PretrainedConfig) -> int | None:
    """Numbers that share a scale: the largest divisor of every layer's kv_heads x width up to 64; None without groups.

    Raises:
        ValueError: it would be below 8, where scales and shifts take more than they save.
    """
    backend, bits = CACHES[kind] or ("", 8)
    if backend not in PACKAGES:
        return None
    heads = key_value_heads_of(config)
    packed = 8 // bits if backend == "hqq" else 1  # hqq packs whole bytes only: so many groups at least
    common = gcd(*(heads * width for widths in cached_widths(config) for width in widths))
    size = max((size for size in range(1, _GROUP + 1) if common % (size * packed) == 0), default=0)
    if size < _SMALLEST_GROUP:
        raise ValueError(
            f"cache {kind} shares a scale among {_SMALLEST_GROUP} numbers or more, which must divide kv_heads x width "
            f"of keys and values: got {common} as the largest common divisor, so groups of {size}; measure "
            f"quantized-fp8, or convert to widths that are multiples of {_SMALLEST_GROUP * packed}"
        )
    return size


def make_cache(kind: str, config: PretrainedConfig, length: int) -> Any:
    """An empty cache.

    Args:
        kind: a key of `CACHES`.
        config: of the model.
        length: tokens that a static cache has room for.

    Raises:
        ValueError: the package behind a quantised cache is missing or too old, or see `group_size`.
    """
    quantised = CACHES[kind]
    if quantised is None:
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=length)
    backend, bits = quantised
    size = group_size(kind, config)
    options: dict[str, Any] = {} if size is None else {"nbits": bits, "q_group_size": size}
    if backend == "hqq":
        options |= {"axis_key": 1, "axis_value": 1}  # groups along the channels, as quanto's
    try:
        return QuantizedCache(backend, config, **options)
    except ImportError as error:
        package = PACKAGES[backend]
        raise ValueError(
            f"cache {kind} needs the package {package}: run `pip install --upgrade {package}`, or measure quantized-fp8, "
            "which needs none"
        ) from error


def working_caches(
    caches: Sequence[str] | None, models: Sequence[Any], device: torch.device, *, compiled: bool
) -> tuple[list[str], list[str]]:
    """Kinds of cache that are known to work, and why others of the default ones do not.

    Raises:
        ValueError: one that was asked for does not; see `check_caches`.
    """
    configs = [model.config for model in models]
    if caches is not None:
        check_caches(caches, configs, device, compiled=compiled)
        return list(caches), []
    working, left_out = [], []
    for cache in _DEFAULT_CACHES:
        try:
            check_caches((cache,), configs, device, compiled=compiled)
        except ValueError as error:
            left_out.append(str(error))
        else:
            working.append(cache)
    return working, left_out


def check_caches(
    kinds: Sequence[str], configs: Sequence[PretrainedConfig], device: torch.device, *, compiled: bool = False
) -> None:
    """Refuse, before anything is measured, what cannot be.

    Raises:
        ValueError: an unknown kind, one named twice, a quantised one with a compiled step or of a model with a sliding
            window, one whose package is missing or cannot build its code here, or see `group_size`.
    """
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"a bench takes different kinds of cache, at least one: got {', '.join(kinds) or 'none'}; try dynamic"
        )
    for kind in kinds:
        if kind not in CACHES:
            near = get_close_matches(kind.lower(), CACHES, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown cache {kind!r}; {hint}choose from {', '.join(CACHES)}")
        if CACHES[kind] is None:
            continue
        if compiled:
            raise ValueError(
                f"a compiled step works with the caches dynamic and static: got {kind}; leave out one of the two"
            )
        for config in configs:
            _check_full_attention(kind, config)
            _try(kind, config, device)


def _check_full_attention(kind: str, config: PretrainedConfig) -> None:
    family = family_of(config)
    windows = [family.sliding_window(config, layer) for layer in family.attention_layers(config)]
    windowed = [window for window in windows if window is not None]
    if windowed:
        raise ValueError(
            f"cache {kind} needs full attention in every layer: got {len(windowed)} of {len(windows)} layers with a "
            f"window of {windowed[0]} tokens; measure dynamic or static"
        )


def _try(kind: str, config: PretrainedConfig, device: torch.device) -> None:
    """Fill a cache and read it back: quanto builds its code at the first reading."""
    cache = make_cache(kind, config, 2)
    try:
        for _ in range(2):
            sides = [
                torch.ones(1, key_value_heads_of(config), 1, width, device=device)
                for width in cached_widths(config)[0]
            ]
            cache.update(*sides, 0)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        compiler = "nvcc" if device.type == "cuda" else "a C++ compiler"
        raise ValueError(
            f"cache {kind} does not work on {device}: {reason}; its package builds code at first use, which needs ninja "
            f"and {compiler}; measure quantized-fp8, which needs neither"
        ) from error
