"""A latent model put together from an original: new attention tensors, everything else shared with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvlatent.model.classes import latent_classes
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import (
    attention_layers_of,
    effective_tables,
    family_of,
    family_of_original,
    head_dim_of,
    key_value_heads_of,
)
from kvlatent.model.layer_parts import parts_of

__all__ = [
    "NOT_CARRIED",
    "assemble",
    "full_width",
    "has_tied_head",
    "listed_layers",
    "original_attention",
    "share_buffers",
    "skeleton",
]


def assemble(model: Any, latent: LatentConfig, attention: Callable[[int], Mapping[str, Tensor]]) -> Any:
    """The latent model of `model` whose layer i has the attention tensors `attention(i)`.

    Args:
        model: the original; it is not modified.
        latent: widths and tables, checked against the model.
        attention: state dict of the `LatentAttention` of a layer.

    Raises:
        ValueError: lists of the config do not fit the model's layers and heads.
    """
    family, latent_model = family_of(model.config), skeleton(model, latent)
    state = {
        name: tensor for name, tensor in model.state_dict().items() if f".{family.attention}." not in name
    }
    for index in attention_layers_of(model.config):
        for name, tensor in attention(index).items():
            state[f"{model.base_model_prefix}.layers.{index}.{family.attention}.{name}"] = tensor
    latent_model.load_state_dict(state, strict=True, assign=True)
    share_buffers(model, latent_model)
    latent_model.tie_weights()
    latent_model.generation_config = copy.deepcopy(model.generation_config)
    return latent_model.train(model.training)


def share_buffers(model: Any, latent_model: Any) -> None:
    """Give a latent model the original's buffers that no state dict holds (a factor of embeddings, say)."""
    for name, buffer in list(latent_model.named_buffers()):
        if buffer.is_meta:
            place, _, short = name.rpartition(".")
            latent_model.get_submodule(place)._buffers[short] = model.get_buffer(name)


def skeleton(model: Any, latent: LatentConfig) -> Any:
    """The latent model of `model` without weights: its parameters are on the meta device.

    Raises:
        ValueError: as `assemble`.
    """
    latent.check_model(attention_layers_of(model.config), key_value_heads_of(model.config))
    config_type, _, causal_type = latent_classes(family_of(model.config).model_type)
    config = config_type(**_config_fields(model, latent))
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        return causal_type(config)


def full_width(model: Any) -> Any:
    """The latent twin of `model` at full width: the same function, bit for bit, sharing every tensor."""
    return assemble(
        model,
        _at_full_width(model.config),
        lambda layer: original_attention(model, layer),
    )


def original_attention(model: Any, layer: int) -> dict[str, Tensor]:
    """The attention tensors of a layer of an original, under the names that a latent attention has for them.

    Raises:
        ValueError: the family's row names projections or norms that are not there.
    """
    family, attention = family_of(model.config), parts_of(model.get_decoder(), layer).attention
    state = {family.latent_name(name): tensor.detach() for name, tensor in attention.state_dict().items()}
    expected = (*family.attention_modules, *(("q_norm", "k_norm") if family.qk_norm else ()))
    found = {name.partition(".")[0] for name in state}
    if absent := [name for name in expected if name not in found]:
        raise ValueError(family.missing(f"the modules {', '.join(absent)} in a {type(attention).__name__}"))
    return state


def _at_full_width(config: Any) -> LatentConfig:
    """Every channel, at the frequency it has."""
    family, head_dim, tables = family_of_original(config), head_dim_of(config), effective_tables(config)
    return LatentConfig(
        d_qk=head_dim,
        d_vo=head_dim,
        tables=tuple((table,) for table in tables),
        channels=((tuple(range(head_dim)),),) * len(tables),
        original_head_dim=head_dim,
        original_model_type=family.model_type,
        keys="full",
        frequencies="own",
        values="full",
        scale="d_qk",
        qk_norm="full" if family.qk_norm else "none",
        layers=listed_layers(config),
    )


def listed_layers(config: Any) -> tuple[int, ...] | None:
    """`LatentConfig.layers` for a source model's config: None where every layer has attention."""
    layers = attention_layers_of(config)
    return None if len(layers) == config.num_hidden_layers else layers


def has_tied_head(model: Any) -> bool:
    """Whether the head is the embedding, as loaded: a config may say so of weights that differ, and upstream then
    leaves them apart."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


NOT_CARRIED = (
    *("model_type", "architectures", "transformers_version", "auto_map"),
    *("head_dim", "qk_head_dim", "v_head_dim"),  # follow from `kv_latent`
    "transformers_weights",  # names a file of the source's
)


def _config_fields(model: Any, latent: LatentConfig) -> dict[str, Any]:
    """Fields of the latent transformers config: the source's, with plain rotary parameters and our own."""
    fields = model.config.to_dict()
    for name in NOT_CARRIED:
        fields.pop(name, None)
    fields["tie_word_embeddings"] = has_tied_head(model)
    if fields.get("rope_parameters"):
        if not fields.get("kv_latent"):  # else the source is latent itself, and these are the original's
            fields["original_rope_parameters"] = fields["rope_parameters"]
        fields["rope_parameters"] = _plain_rope(fields["rope_parameters"])
    fields["num_key_value_heads"] = key_value_heads_of(model.config)
    head_dim = max(latent.max_d_qk, latent.max_d_vo)
    return {**fields, "head_dim": head_dim, "kv_latent": latent.to_dict()}


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters that upstream accepts and nobody reads, of each layer type where there is one a type."""
    if "rope_theta" in rope:
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {name: _plain_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
