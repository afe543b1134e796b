"""A latent model at less than its width: the first channel pairs of its keys and the first directions of its values.

One checkpoint then serves every width up to its own, as well as its channels are ordered and trained for that
(`selection.channel_order`, `training.nested_widths`); what is cut is an ordinary latent model. Rotated pairs and the
channels behind them, which no rotation touches, shrink by the same share.

Shapes: N query heads, K key-value heads, r kept channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvlatent.model.assembly import assemble
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.projection import Projections, Rows
from kvlatent.model.widths import Widths, width_per_layer

__all__ = [
    "check_sliceable",
    "first_channels",
    "projection_rows",
    "slice_model",
    "widths_at_share",
    "widths_within",
]

_LEAST = (2, 1)  # a pair of key channels, a value direction
_SLACK = 1e-9  # of a channel: a share that the checkpoint's widths make is not rounded below them


def check_sliceable(latent: LatentConfig) -> None:
    """Raise `ValueError` for a latent model whose keys cannot be cut without becoming other keys."""
    if latent.qk_norm == "sliced":
        raise ValueError(
            "a QK-norm over the kept channels changes with their number, so no narrower keys can be cut: got "
            "qk_norm=sliced; convert the original once more with --set conversion.qk_norm=full"
        )


def widths_at_share(latent: LatentConfig, num_layers: int, kv: float, name: str = "--kv") -> Widths:
    """The widths of at most a share of the original's cache that lie within a latent model's own.

    Every layer keeps the same share of its channels, split between keys and values as they are now; keys have whole
    pairs. At the model's own share they are its own.

    Args:
        num_layers: how many have attention.
        kv: share of the original's cache, in (0, 1]; name: what its user calls it.

    Raises:
        ValueError: the share is wider than the model, or leaves a layer without a pair of keys and a direction of values.
    """
    own = latent.widths.per_layer(num_layers)
    share = latent.widths.share(latent.original_head_dim, num_layers)
    if not 0 < kv <= 1:
        raise ValueError(
            f"the share of the cache to keep is in (0, 1]: got {name} {kv:g}; try {name} {share / 2:.4g}"
        )
    if kv > share + _SLACK:
        raise ValueError(
            f"a slice cannot be wider than its checkpoint: got {name} {kv:g} of one that keeps {share:.4g} of the "
            f"original's cache; give {name} {share:.4g} or less, or convert the original anew"
        )
    kept = [_shrunk(pair, kv / share) for pair in own]
    for layer, pair in enumerate(kept):
        if not _is_enough(pair):
            smallest = max(_smallest_factor(each) for each in own) * share
            raise ValueError(
                f"a head needs a pair of key channels and a value direction: got {name} {kv:g}, which leaves "
                f"{pair[0]} and {pair[1]} channels in layer {layer}; give {name} {smallest:.4g} or more"
            )
    return Widths.check(*zip(*kept, strict=True), latent.original_head_dim, num_layers)


def _shrunk(own: tuple[int, int], factor: float) -> tuple[int, int]:
    """(d_qk, d_vo) of a layer at a share `factor` of its channels."""
    channels = int(factor * sum(own) + 1e-6)
    keys = min(own[0], 2 * round(channels * own[0] / sum(own) / 2))
    keys += 2 * max(0, -(-(channels - keys - own[1]) // 2))  # what values have no room for
    return keys, channels - keys


def _smallest_factor(own: tuple[int, int]) -> float:
    """The least share of a layer's channels that `_shrunk` can keep, to a channel."""
    total = sum(own)
    return next(n for n in range(3, total + 1) if _is_enough(_shrunk(own, n / total))) / total + 1e-4


def _is_enough(widths: tuple[int, int]) -> bool:
    """Whether a head has a pair of key channels and a value direction."""
    return widths[0] >= _LEAST[0] and widths[1] >= _LEAST[1]


def widths_within(latent: LatentConfig, num_layers: int, d_qk: Any, d_vo: Any) -> Widths:
    """Widths that a user gave (None: the model's own), once they are known to lie within a latent model's.

    Raises:
        ValueError: one is no width of a head, a list has another length than the model has layers, or one is wider than
            the model's.
    """
    given = (latent.d_qk if d_qk is None else d_qk, latent.d_vo if d_vo is None else d_vo)
    widths = Widths.check(*given, latent.original_head_dim, num_layers)
    for name, wanted, own in zip(("d_qk", "d_vo"), widths, latent.widths, strict=True):
        pairs = zip(width_per_layer(wanted, num_layers), width_per_layer(own, num_layers), strict=True)
        for layer, (width, limit) in enumerate(pairs):
            if width > limit:
                raise ValueError(
                    f"a slice cannot be wider than its checkpoint: got {name}={width} in layer {layer}, which has "
                    f"{limit}; give {limit} or less, or convert the original anew"
                )
    return widths


def first_channels(d_qk: int, rotary_dim: int, width: int) -> list[int]:
    """Which channels of a head of `d_qk`, of which `rotary_dim` rotate, are its first `width`: both halves of the first
    pairs, and of the channels behind them the first."""
    rotated, behind = rotary_dim // 2, d_qk - rotary_dim
    pairs = min(rotated, round(width / 2 * rotary_dim / d_qk))
    pairs = max(pairs, -(-(width - behind) // 2))
    return [
        *range(pairs),
        *range(rotated, rotated + pairs),
        *range(rotary_dim, rotary_dim + width - 2 * pairs),
    ]


def projection_rows(attention: Projections, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Which rows of each projection stay, by its name, where these channels of every head do, in this order.

    Args:
        keys: [K, r], channels of keys, and of the queries of their groups; values: [K, r].
    """
    groups = attention.num_heads // attention.num_key_value_heads
    chosen = {"q": keys.repeat_interleave(groups, dim=0), "k": keys, "v": values}
    if attention.q_norm is not None:  # whole heads are normalised before they are cut down
        del chosen["q"], chosen["k"]
    rows = {}
    for part in "qkv":
        parameter, which = attention.parameters_of(part)[0]
        numbers = torch.arange(len(parameter))[which]
        numbers = numbers.view(attention.num_heads if part == "q" else attention.num_key_value_heads, -1)
        rows[part] = numbers.gather(1, chosen[part]) if part in chosen else numbers
    if attention.gate_width:
        gates = torch.arange(len(attention.q_proj.weight)).view(attention.num_heads, -1)
        rows["q"] = torch.cat([rows["q"], gates[:, -attention.gate_width :]], dim=1)
    if attention.fused_by_head:
        return {"qkv_proj": torch.cat(list(rows.values()), dim=1).flatten()}
    if hasattr(attention, "qkv_proj"):
        return {"qkv_proj": torch.cat([each.flatten() for each in rows.values()])}
    return {f"{part}_proj": each.flatten() for part, each in rows.items()}


def slice_model(model: Any, widths: Widths) -> Any:
    """A latent model of those widths, the first channels of `model`'s; a layer of full width shares its tensors.

    Queries take over what the softmax scale of narrower keys divides by less, so logits are those of `model` with the
    other channels set to 0.

    Args:
        model: a latent causal language model; it is not modified.
        widths: within the model's (`widths_at_share`, `widths_within`).

    Raises:
        ValueError: its keys cannot be cut (`check_sliceable`).
    """
    latent, layers = latent_config_of(model.config), attention_layers_of(model.config)
    check_sliceable(latent)
    config = _slice_config(latent, widths, len(layers))
    decoder = model.get_decoder()
    return assemble(
        model,
        config,
        lambda layer: _slice_attention(parts_of(decoder, layer).attention, config, latent, layer),
    )


def _slice_config(latent: LatentConfig, widths: Widths, num_layers: int) -> LatentConfig:
    """The latent config at those widths; one table stays one where all layers keep the same pairs."""
    count = max(len(latent.tables), len(width_per_layer(widths.d_qk)))
    places = range(num_layers) if latent.layers is None else latent.layers
    tables, channels = [], []
    for place, width in zip(list(places)[:count], width_per_layer(widths.d_qk, count), strict=True):
        own = latent.tables_at(place)
        kept = first_channels(latent.d_qk_at(place), own[0].rotary_dim, width)
        turning = sum(channel < own[0].rotary_dim for channel in kept) // 2
        tables.append(tuple(table.subset(range(turning)) for table in own))
        channels.append(tuple(tuple(each[at] for at in kept) for each in latent.channels_at(place)))
    whole = latent.original_head_dim
    return replace(
        latent,
        d_qk=widths.d_qk,
        d_vo=widths.d_vo,
        tables=tuple(tables),
        channels=tuple(channels),
        keys="gram" if latent.keys == "full" and widths.d_qk != whole else latent.keys,
        values="whitened" if latent.values == "full" and widths.d_vo != whole else latent.values,
    )


@torch.no_grad()
def _slice_attention(
    attention: Any, config: LatentConfig, latent: LatentConfig, layer: int
) -> dict[str, Tensor]:
    """State dict of a layer's `LatentAttention` at the widths of `config`, from the module at those of `latent`."""
    state = {name: tensor.detach() for name, tensor in attention.state_dict().items()}
    (d_qk, d_vo), (width, directions) = latent.widths_at(layer), config.widths_at(layer)
    if (width, directions) == (d_qk, d_vo):
        return state
    turning = latent.tables_at(layer)[0].rotary_dim
    kept = torch.tensor(first_channels(d_qk, turning, width))
    heads, scale = attention.num_key_value_heads, (width / d_qk) ** 0.5
    rows = projection_rows(attention, kept.expand(heads, -1), torch.arange(directions).expand(heads, -1))
    for name, index in rows.items():
        for kind in ("weight", "bias"):
            if (whole := state.get(f"{name}.{kind}")) is None:
                continue
            if attention.q_norm is None and width < d_qk and name in ("q_proj", "qkv_proj"):
                whole = _scaled(whole, attention.parameters_of("q")[0][1], scale)
            state[f"{name}.{kind}"] = whole[index.to(whole.device)]
    if width < d_qk and attention.q_norm is not None:
        state |= _cut_maps(attention, kept, scale, turning, is_factored=latent.unrotated == "factored")
        if width == config.tables_at(layer)[0].rotary_dim:  # all that is left rotates
            state.pop("k_map", None)
    if directions < d_vo:
        state |= _cut_outputs(attention, directions)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _scaled(parameter: Tensor, rows: Rows, scale: float) -> Tensor:
    """A copy with those rows times `scale`, rounded once."""
    scaled = parameter.double()
    scaled[rows] *= scale
    return scaled.to(parameter.dtype)


def _cut_maps(
    attention: Projections, kept: Tensor, scale: float, turning: int, *, is_factored: bool
) -> dict[str, Tensor]:
    """What takes normalised queries to the kept channels, and where unrotated keys are factored, those to theirs.

    At full width there are no maps yet: every channel is its own.
    """
    like, heads = attention.o_proj.weight, attention.num_key_value_heads
    eye = torch.eye(attention.d_qk, device=like.device, dtype=like.dtype)
    queries = eye.expand(attention.num_heads, -1, -1) if attention.q_map is None else attention.q_map.detach()
    maps = {"q_map": (queries[:, kept].double() * scale).to(like.dtype)}
    behind = kept[kept >= turning] - turning
    if attention.k_map is not None:
        maps["k_map"] = attention.k_map.detach()[:, behind]
    elif is_factored and len(behind):
        maps["k_map"] = eye[turning:, turning:][behind].expand(heads, -1, -1)
    return maps


def _cut_outputs(attention: Projections, directions: int) -> dict[str, Tensor]:
    """What reads the first directions of every head's average."""
    if attention.gate_width:
        like = attention.o_proj.weight
        lift = torch.eye(attention.gate_width, device=like.device, dtype=like.dtype)
        lift = (
            lift.expand(attention.num_heads, -1, -1) if attention.v_map is None else attention.v_map.detach()
        )
        return {"v_map": lift[..., :directions]}
    heads = attention.o_proj.weight.detach().unflatten(1, (attention.num_heads, -1))
    return {"o_proj.weight": heads[..., :directions].flatten(1)}
