"""The weights of a latent model as a plain decoder holds them: one rotary table, separate projections, upstream's names.

Shapes: N query heads, K key-value heads, D model width; d_qk and d_vo are the latent widths of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from kvlatent.engines.shared_table import SharedTable, share_table
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import family_of
from kvlatent.model.widths import width_per_layer

__all__ = ["PlainShape", "context_of", "plain_shape", "plain_weights", "recipe_of"]


@dataclass(frozen=True)
class PlainShape:
    """What a plain decoder is like that computes what a latent model does.

    Args:
        key_width, value_width: of every head of every layer, channels.
        table: that all its heads share.
        is_padded: it has channels of zeros.
        context: tokens for which it is the same model.
        changes: sentences for users.
    """

    key_width: int
    value_width: int
    table: SharedTable
    is_padded: bool
    context: int
    changes: tuple[str, ...]


def plain_shape(
    latent: Any, target: str, engine: str, *, pad: bool, unequal: bool = False, has_window: bool = True
) -> PlainShape:
    """The plain decoder that a latent model can be.

    Args:
        latent: the model.
        target: as users call it; engine: of `facts.ENGINES`, that a conversion for it has to name.
        pad: unequal widths may be filled up with zeros.
        unequal: keys may be of another width than values.
        has_window: it knows sliding windows.

    Raises:
        ValueError: unequal widths that may not be padded; heads that hold different frequencies; a QK-norm at full width.
    """
    family = family_of(latent.config)
    if family.besides:
        raise ValueError(
            f"{target} holds a decoder with the layers of Llama or Qwen3, and a {family.model_type} model has {family.besides}; "
            "run the checkpoint itself with transformers, or export it with --to openvino"
        )
    config = latent_config_of(latent.config)
    keys, values = set(width_per_layer(config.d_qk)), set(width_per_layer(config.d_vo))
    width = _even(max(keys | values))
    is_padded = not (len(keys) == len(values) == 1 and (keys == values or unequal))
    key_width, value_width = (width, width) if is_padded else (max(keys), max(values))
    if is_padded and not pad:
        raise ValueError(_unequal_sentence(config, target, engine, width))
    if config.qk_norm == "full" and config.max_d_qk < config.original_head_dim:
        raise ValueError(
            f"{target} normalises keys at the width that it caches, and this checkpoint at {config.original_head_dim} before it "
            f"keeps {config.max_d_qk}; convert with {recipe_of(engine, width)} --set conversion.qk_norm=sliced"
        )
    table = share_table(config, latent.config.num_hidden_layers, key_width // 2)
    if table is None:
        raise ValueError(
            f"{target} has one set of {key_width // 2} rotary frequencies for all heads, and the heads of this checkpoint hold "
            f"different ones; convert with {recipe_of(engine, width)}, which shares one table"
        )
    if family.qk_norm:
        _check_norms(config, table, key_width, target, engine)
    context, changes = context_of(latent.config, target, has_window=has_window)
    if is_padded:
        changes = (*changes, _padding_sentence(latent.config, config, width))
    return PlainShape(key_width, value_width, table, is_padded, context, changes)


def recipe_of(engine: str, width: int) -> str:
    """The options of `kvlatent convert` that give a checkpoint of this width for an engine."""
    return f"`kvlatent convert MODEL --engine {engine} --d-qk {width} --d-vo {width}`"


def context_of(config: Any, target: str, *, has_window: bool = True) -> tuple[int, tuple[str, ...]]:
    """Tokens for which a model with one table, and with or without sliding windows, is the same one; and why not more."""
    context, changes = config.max_position_embeddings, ()
    switches = {
        table.switch for tables in latent_config_of(config).tables for table in tables if table.switch
    }
    if switches and (switch := min(switches)) < context:
        context = switch
        changes = (
            f"the context is cut to {switch:,} tokens, where the model changes its rotary table, which {target} cannot",
        )
    windows = {family_of(config).sliding_window(config, layer) for layer in range(config.num_hidden_layers)}
    window = min((w for w in windows if w is not None), default=context)
    if not has_window and window < context:
        context = window
        changes = (
            f"the context is cut to {window:,} tokens, the model's sliding window, which {target} does not know",
        )
    return context, changes


def plain_weights(latent: Any, shape: PlainShape) -> dict[str, Tensor]:
    """State dict of the plain decoder, in the latent model's dtype, under Llama's names; norms of queries and keys under Qwen3's."""
    state = {
        name: tensor.detach() for name, tensor in latent.state_dict().items() if ".self_attn." not in name
    }
    for name in [name for name in state if name.endswith("gate_up_proj.weight")]:
        gate, up = state.pop(name).chunk(2)
        state |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    for layer, module in enumerate(latent.model.layers):
        own = _attention_weights(module.self_attn, layer, shape)
        state |= {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in own.items()}
    return state


def _attention_weights(attention: Any, layer: int, shape: PlainShape) -> dict[str, Tensor]:
    d_qk, d_vo, table = attention.d_qk, attention.d_vo, shape.table
    channels = table.channels[layer]
    # The plain softmax divides by the square root of its own width.
    scales = torch.tensor(table.scales[layer], dtype=torch.float64) * sqrt(shape.key_width / d_qk)
    new: dict[str, Tensor] = {}
    for part, width in (("q", d_qk), ("k", d_qk), ("v", d_vo)):
        for (parameter, rows), kind in zip(attention.parameters_of(part), ("weight", "bias"), strict=False):
            heads = parameter.detach()[rows].unflatten(0, (-1, width))
            if part == "q" and attention.q_norm is None:
                heads = _scaled(heads, scales)
            placed = _widened(heads, shape.value_width) if part == "v" else _arranged(heads, channels)
            new[f"{part}_proj.{kind}"] = placed.flatten(0, 1)
    for name in ("q_norm", "k_norm"):
        if (norm := getattr(attention, name)) is not None:
            weight = norm.weight.detach()[None]
            weight = _scaled(weight, scales) if name == "q_norm" else weight
            new[f"{name}.weight"] = _arranged(weight, channels[:1])[0]
    outputs = attention.o_proj.weight.detach().T.unflatten(0, (-1, d_vo))
    new["o_proj.weight"] = _widened(outputs, shape.value_width).flatten(0, 1).T.contiguous()
    if attention.o_proj.bias is not None:
        new["o_proj.bias"] = attention.o_proj.bias.detach()
    return new


def _scaled(heads: Tensor, scales: Tensor) -> Tensor:
    """[H, d, ...] with every channel scaled, rounded once; itself where all scales are 1."""
    if bool((scales == 1).all()):
        return heads
    return (heads.double() * scales.view(-1, *[1] * (heads.dim() - 2))).to(heads.dtype)


def _arranged(heads: Tensor, channels: Sequence[Sequence[int | None]]) -> Tensor:
    """[H, d, ...] with channels where the shared table wants them; each list serves the heads of its group."""
    new = heads.new_zeros(heads.shape[0], len(channels[0]), *heads.shape[2:])
    group = heads.shape[0] // len(channels)
    for head in range(heads.shape[0]):
        places = [
            (slot, channel) for slot, channel in enumerate(channels[head // group]) if channel is not None
        ]
        slots, taken = zip(*places, strict=True)
        new[head, list(slots)] = heads[head, list(taken)]
    return new


def _widened(heads: Tensor, width: int) -> Tensor:
    """[H, d, ...] with zeros up to `width` channels."""
    new = heads.new_zeros(heads.shape[0], width, *heads.shape[2:])
    new[:, : heads.shape[1]] = heads
    return new


def _check_norms(config: Any, table: SharedTable, width: int, target: str, engine: str) -> None:
    """Raise `ValueError` unless a norm that all heads share fits: the same order in all of them, no channel of zeros."""
    if any(len(set(lists)) > 1 for lists in table.channels):
        raise ValueError(
            f"a QK-norm has one weight for all heads, and the heads of this checkpoint list their {width // 2} frequencies in "
            f"different orders; convert with {recipe_of(engine, width)} --table model --set conversion.qk_norm=sliced"
        )
    if any(None in kept for lists in table.channels for kept in lists):
        raise ValueError(
            f"a QK-norm cannot be filled up with zeros, and {target} needs keys of width {width}: got d_qk={config.d_qk}; "
            f"convert with {recipe_of(engine, width)} --set conversion.qk_norm=sliced"
        )


def _unequal_sentence(config: Any, target: str, engine: str, width: int) -> str:
    keys, values = width_per_layer(config.d_qk), width_per_layer(config.d_vo)
    said = [
        f"{name}={min(widths)}" + (f" to {max(widths)}" if len(set(widths)) > 1 else "")
        for name, widths in (("d_qk", keys), ("d_vo", values))
    ]
    even = max(2, round((sum(keys) / len(keys) + sum(values) / len(values)) / 16) * 8)
    return (
        f"{target} has one width for keys and values of all layers: got {' and '.join(said)}; convert with "
        f"{recipe_of(engine, min(even, width))}, or fill up with zeros to {width} by --pad, which caches {width} for both"
        + (
            ", or keep them apart by --experimental"
            if engine == "llama.cpp" and len(set(keys)) == len(set(values)) == 1
            else ""
        )
    )


def _padding_sentence(hf_config: Any, config: Any, width: int) -> str:
    heads, layers = hf_config.num_key_value_heads, hf_config.num_hidden_layers
    own, original = (
        config.cache_bytes_per_token(layers, heads, 1),
        2 * config.original_head_dim * layers * heads,
    )
    padded = 2 * width * layers * heads
    return (
        f"widths are filled up with zeros to {width} for keys and values, so the cache takes {padded / original:.1%} of the "
        f"original's and not the latent {own / original:.1%}"
    )


def _even(width: int) -> int:
    return width + width % 2
