"""The attention tensors of one latent layer, from the original's: kept rows and gains; values are those of `value_weights`.

Whatever does not change is the original's tensor itself. Shapes: D model width, d head width, N query heads, K
key-value heads, G = N / K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvlatent.conversion.value_weights import gated_values, narrow_values, take_rows
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import effective_table, key_value_heads_of
from kvlatent.model.family import Family
from kvlatent.selection.choices import BY_PAIRS
from kvlatent.selection.pair_search import pair_gains
from kvlatent.selection.statistics import LayerStatistics
from kvlatent.selection.unrotated import UnrotatedMaps, unrotated_maps

__all__ = ["attention_weights", "kept_pairs"]


@torch.no_grad()
def attention_weights(
    source: dict[str, Tensor],
    family: Family,
    hf_config: Any,
    latent: LatentConfig,
    layer: int,
    *,
    statistics: LayerStatistics | None = None,
    gains: bool = False,
) -> dict[str, Tensor]:
    """State dict of the layer's `LatentAttention`.

    Args:
        source: the original's attention tensors (see `original_attention`); hf_config: its config.
        statistics: of the layer; needed for gains and for values in the basis "whitened".
        gains: scale kept pairs per query head to make up for dropped ones.

    Raises:
        ValueError: a sliced QK-norm whose heads keep different channels.
    """
    keep_qk = latent.d_qk_at(layer) == latent.original_head_dim
    keep_vo = latent.d_vo_at(layer) == latent.original_head_dim
    if keep_qk and keep_vo:
        return source
    new = (
        _split_qkv(source, family, hf_config, latent.original_head_dim) if family.fused_qkv else dict(source)
    )
    if not keep_qk:
        factors = _query_factors(latent, layer, hf_config, statistics if gains else None)
        rotated, maps = latent.tables_at(layer)[0].rotary_dim, None
        if latent.unrotated == "factored" and rotated < latent.d_qk_at(layer):
            maps = _unrotated_maps(latent, layer, hf_config, statistics)
        new.update(_narrow_keys(new, latent, layer, factors, hf_config.num_attention_heads, maps))
    if not keep_vo and family.gates_output:
        new.update(gated_values(new, latent, layer, key_value_heads_of(hf_config), statistics))
    elif not keep_vo:
        new.update(narrow_values(new, latent, layer, key_value_heads_of(hf_config), statistics))
    if family.fused_qkv:
        new |= _fuse_qkv(new, family, hf_config.num_attention_heads)
    return new


def _split_qkv(source: dict[str, Tensor], family: Family, hf_config: Any, head_dim: int) -> dict[str, Tensor]:
    """The parts of a fused projection under the names of a split one."""
    heads = hf_config.num_attention_heads
    rows = [n * head_dim for n in (heads, *[key_value_heads_of(hf_config)] * 2)]
    new = {name: tensor for name, tensor in source.items() if not name.startswith("qkv_proj.")}
    for kind in ("weight", "bias"):
        if (fused := source.get(f"qkv_proj.{kind}")) is None:
            continue
        if family.fused_qkv == "by head":
            split = fused.unflatten(0, (heads, -1)).split(head_dim, dim=1)
            parts = [part.flatten(0, 1) for part in split]
        else:
            parts = list(fused.split(rows))
        new |= {f"{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return new


def _fuse_qkv(new: dict[str, Tensor], family: Family, heads: int) -> dict[str, Tensor]:
    """The inverse of `_split_qkv`; takes what it puts together out of `new`."""
    fused = {}
    for kind in ("weight", "bias"):
        parts = [new.pop(name) for part in "qkv" if (name := f"{part}_proj.{kind}") in new]
        if parts and family.fused_qkv == "by head":
            parts = [torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)]
        if parts:
            fused[f"qkv_proj.{kind}"] = torch.cat(parts)
    return fused


def kept_pairs(channels: tuple[int, ...], rotary_dim: int, head_dim: int) -> tuple[int, ...]:
    """The channel pair behind every kept channel: rotated pairs count first, then those that pass through."""
    half, passed = rotary_dim // 2, (head_dim - rotary_dim) // 2
    return tuple(c % half if c < rotary_dim else half + (c - rotary_dim) % passed for c in channels)


def _query_factors(
    latent: LatentConfig, layer: int, hf_config: Any, statistics: LayerStatistics | None
) -> Tensor:
    """What multiplies kept query channels: [N or 1, d_qk] in float64.

    The original softmax scale (the module's is d_qk^-1/2), gains, and for channels that were not rotated but now sit
    in the table at frequency 0, the inverse of the table's attention factor on both sides.
    """
    head_dim, d_qk = latent.original_head_dim, latent.d_qk_at(layer)
    fold = (d_qk / head_dim) ** 0.5 if latent.scale == "original" else 1.0
    channels, tables = latent.channels_at(layer), latent.tables_at(layer)
    factors = torch.full((1, d_qk), fold, dtype=torch.float64)
    in_table = latent.keys in BY_PAIRS and latent.unrotated == "selected"
    if in_table and tables[0].attention_factor != 1.0:
        idle = torch.tensor([[f == 0.0 for f in table.short] * 2 for table in tables])
        factors = torch.where(idle, fold / tables[0].attention_factor ** 2, factors)
        factors = factors.repeat_interleave(hf_config.num_attention_heads // len(factors), dim=0)
    if statistics is None:
        return factors
    original = effective_table(hf_config, layer).rotary_dim
    grams = statistics.output_gram.split(len(statistics.output_gram) // len(channels))
    gains = []
    turning = tables[0].rotary_dim
    for member, kept in zip(grams, channels, strict=True):
        if latent.unrotated == "factored":  # the maps make up for what they drop themselves
            turned = kept_pairs(kept[: turning // 2], original, head_dim)
            gain = (
                pair_gains(member[:, : original // 2, : original // 2], turned)
                if turned
                else member[:, :0, 0]
            )
            gains.append(torch.cat([gain, gain, gain.new_ones(len(gain), d_qk - turning)], dim=1))
            continue
        pairs = kept_pairs(kept, original, head_dim)
        distinct = tuple(sorted(set(pairs)))
        gain = (_shared_gains if latent.qk_norm == "sliced" else pair_gains)(member, distinct)
        gains.append(gain[:, [distinct.index(pair) for pair in pairs]])
    return factors * torch.cat(gains)


def _shared_gains(grams: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Gains for all heads together, where they can only sit in the norm's weight: [1, n]."""
    return pair_gains(grams.sum(0, keepdim=True), kept)


def _narrow_keys(
    source: dict[str, Tensor],
    latent: LatentConfig,
    layer: int,
    factors: Tensor,
    heads: int,
    maps: UnrotatedMaps | None,
) -> dict[str, Tensor]:
    """New q and k tensors of one layer: kept rows, the queries' times `factors`, and unrotated ones by `maps`."""
    channels, head_dim = latent.channels_at(layer), latent.original_head_dim
    weight = source["q_proj.weight"]
    if latent.qk_norm == "full":
        index = torch.tensor(channels).repeat_interleave(heads // len(channels), dim=0)
        chosen = torch.nn.functional.one_hot(index, head_dim) * factors[..., None]
        if maps is None:
            return {"q_map": chosen.to(weight)}
        chosen = chosen.expand(heads, -1, -1).clone()
        behind, unrotated = maps.keys.shape[1:]
        chosen[:, -behind:] = 0
        chosen[:, -behind:, -unrotated:] = factors[:, -behind:, None] * maps.queries
        return {"q_map": chosen.to(weight), "k_map": maps.keys.to(weight)}
    new = {
        f"{name}.{kind}": take_rows(source[f"{name}.{kind}"], channels, head_dim)
        for name in ("q_proj", "k_proj")
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in source
    }
    if maps is not None:
        new = {
            name: _mapped(source[name], kept, maps.queries if name[0] == "q" else maps.keys, head_dim)
            for name, kept in new.items()
        }
    if latent.qk_norm == "sliced":
        new |= {f"{name}_norm.weight": _sliced_norm(source, new, name, channels, head_dim) for name in "qk"}
        count = len(new["q_norm.weight"]) // factors.shape[1]  # of heads with a weight of their own
        new["q_norm.weight"] = _scaled(new["q_norm.weight"], factors[:1].expand(count, -1).flatten())
        return new
    for name in [name for name in new if name.startswith("q_")]:
        rows = factors.expand(new[name].shape[0] // factors.shape[1], -1).flatten()
        new[name] = _scaled(new[name], rows)
    return new


def _mapped(source: Tensor, kept: Tensor, maps: Tensor, head_dim: int) -> Tensor:
    """`kept` rows of a projection with the last ones of every head as maps [H, r, u] of its last u original ones."""
    heads, (behind, unrotated) = len(maps), maps.shape[1:]
    rows = source.double().cpu().view(heads, head_dim, -1)[:, -unrotated:]
    new = kept.double().cpu().view(heads, len(kept) // heads, -1).clone()
    new[:, -behind:] = maps @ rows
    return new.view(kept.shape).to(kept)


def _unrotated_maps(
    latent: LatentConfig, layer: int, hf_config: Any, statistics: LayerStatistics | None
) -> UnrotatedMaps:
    """The maps of a layer's unrotated channels to those that are cached behind the rotated ones."""
    if statistics is None or not statistics.unrotated_keys.numel():
        raise ValueError(
            "unrotated channels are factored by statistics of them: got none for layer "
            f"{layer}; calibrate again, or convert with unrotated=selected"
        )
    width = latent.d_qk_at(layer) - latent.tables_at(layer)[0].rotary_dim
    groups = hf_config.num_attention_heads // key_value_heads_of(hf_config)
    return unrotated_maps(statistics, groups, width)


def _scaled(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor` with its rows scaled, rounded once; itself where all factors are 1."""
    if bool((rows == 1).all()):
        return tensor
    shape = (-1, *[1] * (tensor.dim() - 1))
    return (tensor.double() * rows.to(tensor.device).view(shape)).to(tensor.dtype)


def _sliced_norm(
    source: dict[str, Tensor],
    new: dict[str, Tensor],
    name: str,
    channels: tuple[tuple[int, ...], ...],
    head_dim: int,
) -> Tensor:
    """Norm weight of the kept channels times E[rms kept / rms all], estimated from the weights (white inputs)."""
    if len(channels) > 1:
        raise ValueError(
            f"a sliced QK-norm has one weight for all heads, so they must keep the same channels: got {len(channels)} "
            "lists; use qk_norm='full' or one table per layer"
        )
    weight = f"{name}_proj.weight"
    ratio = (new[weight].double().square().mean() / source[weight].double().square().mean()).sqrt()
    kept = take_rows(source[f"{name}_norm.weight"], channels, head_dim)
    return (kept.double() * ratio).to(kept.dtype)
