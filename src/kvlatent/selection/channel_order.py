"""Channels of a latent model in the order of their worth, so that the first of them are the best narrower model.

A conversion keeps pairs in the order of their frequencies, and alignment leaves value directions in any order. Here one
look at text ranks the pairs by the greedy search on what they add to the logits, and turns values into directions that
do not correlate, the most important first. The model computes the same: pairs move with their frequencies, and outputs
are read from the turned values.

Shapes: N query heads, K key-value heads, G = N / K, P rotated channel pairs, u channels behind them, T positions, R rows.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvlatent.model.channel_slices import check_sliceable, projection_rows
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of, family_of
from kvlatent.model.layer_parts import parts_of, rotary_of_decoder
from kvlatent.model.projection import Projected
from kvlatent.model.rotary import LatentRotary, apply_rotary
from kvlatent.selection.attention_rows import allowed, masked_logits, recorded_projections, rotary_of
from kvlatent.selection.pair_search import greedy_order
from kvlatent.selection.value_bases import ordered_directions

__all__ = ["apply_order", "order_channels", "rank_channels"]

_ROWS = 16  # a block, that pairs are ranked by
_BLOCKS = 16


@dataclass
class _Sums:
    """What text shows of a layer: Gram matrices [N, P, P] of what pairs add to logits, energies [K, u] of the channels
    behind, second moments [N, d_vo, d_vo] of averaged values."""

    grams: Tensor
    behind: Tensor
    averaged: Tensor


def order_channels(model: Any, blocks: Any) -> list[dict[str, Any]]:
    """Rank the channels of every layer on the first blocks of a text and put them in that order, in place.

    Args:
        model: a latent causal language model; tensors that it shares with others are replaced, never written to.
        blocks: rows of `input_ids` and `position_ids`.

    Returns:
        What `apply_order` takes; JSON-able.
    """
    ranks = rank_channels(model, blocks)
    apply_order(model, ranks)
    return ranks


@torch.no_grad()
def rank_channels(model: Any, blocks: Any) -> list[dict[str, Any]]:
    """For every layer {"keys": [K][d_qk] channels in their new order, "values": [K][d_vo][d_vo] directions, as rows}.

    Heads that share a rotary table share an order.

    Raises:
        ValueError: the keys of a layer have no order of their own (`check_ordered`).
    """
    latent = latent_config_of(model.config)
    layers, decoder = attention_layers_of(model.config), model.get_decoder()
    attentions = [parts_of(decoder, layer).attention for layer in layers]
    _check_ordered(latent, attentions)
    sums = [_empty_sums(attention, decoder) for attention in attentions]
    generator = torch.Generator().manual_seed(0)
    was_training = model.training
    model.eval()
    for index in range(min(_BLOCKS, len(blocks))):
        ids, positions = (
            torch.as_tensor(blocks[index][name]).long()[None].to(decoder.device)
            for name in ("input_ids", "position_ids")
        )
        rows = (
            torch.randperm(ids.shape[1], generator=generator)[:_ROWS].sort().values[None].to(decoder.device)
        )
        with ExitStack() as watching:
            recorded = [watching.enter_context(recorded_projections(attention)) for attention in attentions]
            for attention, each in zip(attentions, sums, strict=True):
                _watch_averages(attention, each)
                watching.callback(delattr, attention, "read_out")
            decoder(input_ids=ids, position_ids=positions, use_cache=False)
        for attention, each, (projected,) in zip(attentions, sums, recorded, strict=True):
            _add_keys(each, attention, decoder, projected, positions, rows)
    model.train(was_training)
    orders = _key_orders(latent, layers, attentions, sums)
    return [
        {"keys": keys.tolist(), "values": _directions(attention, each).tolist()}
        for attention, each, keys in zip(attentions, sums, orders, strict=True)
    ]


def _check_ordered(latent: LatentConfig, attentions: list[Any]) -> None:
    """Raise `ValueError` where the keys of a layer cannot be put in an order."""
    check_sliceable(latent)
    for attention in attentions:
        if attention.q_norm is not None and attention.q_map is None:
            raise ValueError(
                f"keys of full width behind a QK-norm have the original's order: got d_qk={attention.d_qk}; convert to "
                f"d_qk={attention.d_qk - 2} or less to train several widths, or leave stage2.nested_kv out"
            )


def _rotary(attention: Any, decoder: Any) -> LatentRotary:
    return rotary_of_decoder(decoder) if attention.rotary is None else attention.rotary


def _empty_sums(attention: Any, decoder: Any) -> _Sums:
    turning = _rotary(attention, decoder).tables[0].rotary_dim
    like: dict[str, Any] = {"dtype": torch.float64, "device": decoder.device}
    heads, pairs = attention.num_heads, turning // 2
    return _Sums(
        torch.zeros(heads, pairs, pairs, **like),
        torch.zeros(attention.num_key_value_heads, attention.d_qk - turning, **like),
        torch.zeros(heads, attention.d_vo, attention.d_vo, **like),
    )


def _watch_averages(attention: Any, sums: _Sums) -> None:
    """Have every forward add the moments of what its heads average, until the attention's own `read_out` is deleted."""

    def read_out(averaged: Tensor, gate: Tensor | None) -> Tensor:
        heads = averaged.double().flatten(0, -2).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        sums.averaged += heads.transpose(1, 2) @ heads
        return type(attention).read_out(attention, averaged, gate)

    attention.read_out = read_out


def _add_keys(
    sums: _Sums, attention: Any, decoder: Any, projected: Projected, positions: Tensor, rows: Tensor
) -> None:
    """Add what the pairs put into the logits of sampled rows [1, R], centred under the attention weights."""
    with torch.autocast(decoder.device.type, enabled=False):
        cos, sin = rotary_of(attention, decoder, projected.key.float(), positions)
        query, key = (apply_rotary(each.float(), cos, sin) for each in projected[:2])
        query = query[:, :, rows[0]]
        weights = masked_logits(
            attention, query, key, allowed(positions, rows, attention.sliding_window)
        ).softmax(-1)
        half, turning = cos.shape[-1] // 2, cos.shape[-1]
        groups = attention.num_heads // attention.num_key_value_heads
        keys = key[0].repeat_interleave(groups, dim=0)  # [N, T, d]
        queries = query[0] * attention.scaling
        for row in range(queries.shape[1]):
            added = queries[:, row, None, :half] * keys[..., :half]
            added = (
                added + queries[:, row, None, half:turning] * keys[..., half:turning]
            ).double()  # [N, T, P]
            weight = weights[0, :, row, :, None].double()
            centred = added - (weight * added).sum(1, keepdim=True)
            sums.grams += (weight * centred).transpose(1, 2) @ centred
        idle = (projected.query[0, ..., turning:], projected.key[0, ..., turning:])
        energies = [each.double().square().sum(1) for each in idle]
        sums.behind += energies[0].unflatten(0, (-1, groups)).sum(1) * energies[1]


def _key_orders(
    latent: LatentConfig, layers: tuple[int, ...], attentions: list[Any], sums: list[_Sums]
) -> list[Tensor]:
    """Channels of the keys in their new order, [K, d_qk] a layer; one for all heads that share a table."""
    shared = len(latent.tables) == 1 and len(layers) > 1
    found = []
    for layer, attention, each in zip(layers, attentions, sums, strict=True):
        heads = attention.num_key_value_heads
        together = heads if len(latent.tables_at(layer)) == 1 else 1
        grams, behind = each.grams, each.behind
        if shared:
            grams = torch.stack([_by_head(one.grams, heads, together) for one in sums]).sum(0)
            shares = [one.behind / one.behind.sum().clamp_min(1e-30) for one in sums]
            behind = torch.stack(shares).sum(0)
        else:
            grams = _by_head(grams, heads, together)
        orders = []
        for members, energy in zip(grams, behind.unflatten(0, (-1, together)).sum(1), strict=True):
            pairs = torch.tensor(greedy_order(members.cpu()) if members.shape[-1] else [], dtype=torch.long)
            half = members.shape[-1]
            orders.append(
                torch.cat(
                    [pairs, pairs + half, 2 * half + energy.argsort(descending=True, stable=True).cpu()]
                )
            )
        found.append(torch.stack(orders).repeat_interleave(together, dim=0))
    return found


def _by_head(grams: Tensor, heads: int, together: int) -> Tensor:
    """Gram matrices [sets, query heads of a set, P, P], each set's heads sharing an order."""
    return grams.unflatten(0, (heads // together, -1))


def _directions(attention: Any, sums: _Sums) -> Tensor:
    """Directions of the values of every key-value head as rows, the most important first: [K, d_vo, d_vo]."""
    heads = attention.num_heads
    read = attention.o_proj.weight.detach().double().unflatten(1, (heads, -1)).transpose(0, 1)  # [N, D, d]
    if attention.v_map is not None:
        read = read @ attention.v_map.detach().double()
    groups = heads // attention.num_key_value_heads
    moments = sums.averaged / sums.averaged.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-30)
    found = [
        ordered_directions(*pair)
        for pair in zip(read.cpu().split(groups), moments.cpu().split(groups), strict=True)
    ]
    return torch.stack([each / each.norm(dim=1, keepdim=True) for each in found])


@torch.no_grad()
def apply_order(model: Any, ranks: list[dict[str, Any]]) -> None:
    """Put the channels of a latent model in the order that `rank_channels` found, in place: weights, tables and config."""
    latent, decoder, layers = (
        latent_config_of(model.config),
        model.get_decoder(),
        attention_layers_of(model.config),
    )
    tables, channels = list(latent.tables), list(latent.channels)
    for place, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        attention, keys = parts_of(decoder, layer).attention, torch.tensor(rank["keys"])
        _turn_values(attention, torch.tensor(rank["values"], dtype=torch.float64))
        _move_keys(attention, keys, latent.tables_at(layer)[0].rotary_dim)
        if place < len(tables):
            half = latent.tables_at(layer)[0].rotary_dim // 2
            each = keys[:: len(keys) // len(tables[place])]
            tables[place] = tuple(
                table.subset(order[:half].tolist()) for table, order in zip(tables[place], each, strict=True)
            )
            moved = zip(channels[place], each.tolist(), strict=True)
            channels[place] = tuple(_moved_channels(kept, order, latent, half) for kept, order in moved)
    _set_config(model, replace(latent, tables=tuple(tables), channels=tuple(channels)))


def _moved_channels(
    kept: tuple[int, ...], order: list[int], latent: LatentConfig, half: int
) -> tuple[int, ...]:
    """The record of kept channels in their new order; factored ones are numbers of maps, not channels, and stay."""
    fixed = 2 * half if latent.unrotated == "factored" else len(kept)
    return (*(kept[at] for at in order[:fixed]), *kept[fixed:])


def _set_config(model: Any, latent: LatentConfig) -> None:
    """Write a latent config with other tables into the model: its transformers config and what was built from the tables."""
    decoder = model.get_decoder()
    model.config.kv_latent = decoder.config.kv_latent = latent.to_dict()
    family = family_of(model.config)
    if latent.one_table and family.rotary:
        shared = LatentRotary(latent.tables_at(0), in_float32=family.rotates_in_float32)
        setattr(decoder, family.rotary, shared)
    for layer in attention_layers_of(model.config):
        attention = parts_of(decoder, layer).attention
        if attention.rotary is not None:
            attention.rotary = LatentRotary(latent.tables_at(layer), in_float32=attention.rotary.in_float32)
        if attention.kept is not None:
            turning = latent.tables_at(layer)[0].rotary_dim
            kept = latent.channels_at(layer)
            shown = kept if attention.k_map is None else tuple(each[:turning] for each in kept)
            attention.kept = type(attention.kept)(shown)


def _move_keys(attention: Any, keys: Tensor, turning: int) -> None:
    """Reorder the key and query channels of a layer; behind a QK-norm what cuts its heads down."""
    heads, groups = len(keys), attention.num_heads // len(keys)
    if attention.q_map is None:
        values = torch.arange(attention.d_vo).expand(heads, -1)
        for name, rows in projection_rows(attention, keys, values).items():
            for parameter in getattr(attention, name).parameters():
                parameter.data = parameter.data[rows.to(parameter.device)]
        return
    spread = keys.repeat_interleave(groups, dim=0).to(attention.q_map.device)
    attention.q_map.data = attention.q_map.data.gather(1, spread[..., None].expand_as(attention.q_map))
    if attention.k_map is not None:
        behind = (keys[:, turning:] - turning).to(attention.k_map.device)
        attention.k_map.data = attention.k_map.data.gather(1, behind[..., None].expand_as(attention.k_map))


def _turn_values(attention: Any, directions: Tensor) -> None:
    """Values in other directions [K, d_vo, d_vo], and outputs that read them."""
    heads, groups = attention.num_heads, attention.num_heads // len(directions)
    for parameter, rows in attention.parameters_of("v"):
        whole = parameter.data.clone()
        value = whole[rows].double().view(*directions.shape[:2], -1)
        whole[rows] = (directions.to(value.device) @ value).view(whole[rows].shape).to(whole)
        parameter.data = whole
    inverse = torch.linalg.inv(directions).repeat_interleave(groups, dim=0)
    if attention.v_map is not None:
        lift = attention.v_map
        lift.data = (lift.data.double() @ inverse.to(lift.device)).to(lift.data)
        return
    weight = attention.o_proj.weight
    read = weight.data.double().unflatten(1, (heads, -1)).transpose(0, 1) @ inverse.to(weight.device)
    weight.data = read.transpose(0, 1).flatten(1).to(weight.data)
