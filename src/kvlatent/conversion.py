"""From a pretrained model and widths to a latent model; the original stays untouched.

`choose` decides what is kept, `convert` builds the model. Only attention projections are new tensors; everything
else shares storage with the original. Shapes: D model width, N query heads, K key-value heads, G = N / K.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .choose import Widths, choose, resolve_choices
from .config import LatentConfig
from .families import Family, family_of, head_dim_of
from .modeling import latent_classes
from .select import product_svd, stride_channels

__all__ = ["convert"]


def convert(
    model: PreTrainedModel,
    config: LatentConfig | None = None,
    *,
    d_qk: Widths | None = None,
    d_vo: Widths | None = None,
    preset: str = "paper",
    keys: str | None = None,
    frequencies: str | None = None,
    values: str | None = None,
    qk_norm: str = "full",
) -> PreTrainedModel:
    """A latent copy of `model`; unchanged tensors share storage with it, none of its own is modified.

    Args:
        model: a causal language model of a supported family.
        config: a finished latent config; otherwise one is made from the arguments that follow (see `choose`).
        d_qk, d_vo: widths; the side left out keeps its full width.
        preset: "paper" (default) or "own-frequency"; `keys`, `frequencies`, `values` replace single choices.
        qk_norm: see `choose`.

    Raises:
        ValueError: the architecture is not supported, or the widths do not fit.
    """
    family, head_dim = family_of(model.config), head_dim_of(model.config)
    if config is None:
        choices = resolve_choices(preset, keys, frequencies, values)
        sides = (head_dim if d_qk is None else d_qk, head_dim if d_vo is None else d_vo)
        config = choose(model.config, *sides, choices, qk_norm=qk_norm)
    _check_source(model, config, family, head_dim)
    config.check_model(model.config.num_hidden_layers, model.config.num_key_value_heads)
    config_type, _, causal_type = latent_classes(family.model_type)
    hf_config = config_type(**_config_fields(model.config, config))
    hf_config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        latent_model = causal_type(hf_config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    for index, layer in enumerate(model.model.layers):
        for name, tensor in _attention_weights(layer.self_attn, family, model.config, config, index).items():
            state[f"model.layers.{index}.self_attn.{name}"] = tensor
    latent_model.load_state_dict(state, strict=True, assign=True)
    latent_model.tie_weights()
    latent_model.generation_config = copy.deepcopy(model.generation_config)
    return latent_model.train(model.training)


def _check_source(model: Any, config: LatentConfig, family: Family, head_dim: int) -> None:
    """Raise `ValueError` unless the config was made for this model, and the model is a causal language model."""
    if not isinstance(model, family.upstream("ForCausalLM")):
        raise ValueError(  # noqa: TRY004 - the command line shows ValueError as one sentence
            f"convert needs a {family.prefix}ForCausalLM: got {type(model).__name__}; load the checkpoint with "
            "AutoModelForCausalLM"
        )
    made_for = (config.original_model_type, config.original_head_dim)
    if made_for != (family.model_type, head_dim) or (config.qk_norm == "none") == family.qk_norm:
        raise ValueError(
            f"the latent config was made for {made_for[0]} with head_dim={made_for[1]}, qk_norm={config.qk_norm}: got "
            f"{family.model_type} with head_dim={head_dim}; make one with choose(model.config, ...)"
        )


def _config_fields(config: Any, latent: LatentConfig) -> dict[str, Any]:
    """Fields of the latent transformers config: the source's, with plain rotary parameters and our own."""
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "head_dim"):
        fields.pop(name, None)
    fields["original_rope_parameters"] = fields["rope_parameters"]
    fields["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": fields["rope_parameters"]["rope_theta"],
    }
    head_dim = max(latent.max_d_qk, latent.max_d_vo)
    return {**fields, "head_dim": head_dim, "kv_latent": latent.to_dict()}


@torch.no_grad()
def _attention_weights(
    attention: Any, family: Family, hf_config: Any, latent: LatentConfig, layer: int
) -> dict[str, Tensor]:
    """State dict of the layer's `LatentAttention`; what does not change is the original's tensor itself."""
    source = {name: tensor.detach() for name, tensor in attention.state_dict().items()}
    keep_qk = latent.d_qk_at(layer) == latent.original_head_dim
    keep_vo = latent.d_vo_at(layer) == latent.original_head_dim
    if keep_qk and keep_vo:
        return source
    new = _split_qkv(source, hf_config, latent.original_head_dim) if family.fused_qkv else dict(source)
    if not keep_qk:
        new.update(_narrow_keys(new, latent, layer))
    if not keep_vo:
        new.update(_narrow_values(new, latent, layer, hf_config.num_key_value_heads))
    if family.fused_qkv:
        new["qkv_proj.weight"] = torch.cat([new.pop(f"{name}_proj.weight") for name in "qkv"])
    return new


def _split_qkv(source: dict[str, Tensor], hf_config: Any, head_dim: int) -> dict[str, Tensor]:
    """Views of a fused projection under the names of a split one."""
    rows = [n * head_dim for n in (hf_config.num_attention_heads, *[hf_config.num_key_value_heads] * 2)]
    parts = source["qkv_proj.weight"].split(rows)
    return {"o_proj.weight": source["o_proj.weight"]} | {
        f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)
    }


def _take(tensor: Tensor, channels: tuple[tuple[int, ...], ...], head_dim: int) -> Tensor:
    """Rows of `tensor` ([H * head_dim, ...]) that survive, per head; each list serves the heads of its group."""
    heads = tensor.unflatten(0, (-1, head_dim))
    groups = heads.shape[0] // len(channels)
    kept = [heads[h][list(channels[h // groups])] for h in range(heads.shape[0])]
    return torch.cat(kept)


def _narrow_keys(source: dict[str, Tensor], latent: LatentConfig, layer: int) -> dict[str, Tensor]:
    """New q and k tensors of one layer: kept rows, with the original softmax scale folded into the queries."""
    channels, head_dim, d_qk = latent.channels_at(layer), latent.original_head_dim, latent.d_qk_at(layer)
    # Module scale d_qk^-1/2 times this factor is the original head_dim^-1/2.
    fold = (d_qk / head_dim) ** 0.5 if latent.scale == "original" else 1.0
    if latent.qk_norm == "full":
        heads = source["q_proj.weight"].shape[0] // head_dim
        return {"q_gain": torch.full((heads, d_qk), fold, dtype=source["q_proj.weight"].dtype)}
    new = {
        f"{name}.{kind}": _take(source[f"{name}.{kind}"], channels, head_dim)
        for name in ("q_proj", "k_proj")
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in source
    }
    folded = [name for name in new if name.startswith("q_")]
    if latent.qk_norm == "sliced":
        new |= {f"{name}_norm.weight": _sliced_norm(source, new, name, channels) for name in "qk"}
        folded = ["q_norm.weight"]
    for name in folded:
        new[name] = (new[name].float() * fold).to(new[name].dtype) if fold != 1 else new[name]
    return new


def _sliced_norm(
    source: dict[str, Tensor], new: dict[str, Tensor], name: str, channels: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Norm weight of the kept channels times E[rms kept / rms all], estimated from the weights (white inputs)."""
    if len(channels) > 1:
        raise ValueError(
            f"a sliced QK-norm has one weight for all heads, so they must keep the same channels: got {len(channels)} "
            "lists; use qk_norm='full' or one table per layer"
        )
    weight = f"{name}_proj.weight"
    ratio = (new[weight].double().square().mean() / source[weight].double().square().mean()).sqrt()
    kept = source[f"{name}_norm.weight"][list(channels[0])]
    return (kept.double() * ratio).to(kept.dtype)


def _narrow_values(
    source: dict[str, Tensor], latent: LatentConfig, layer: int, num_key_value_heads: int
) -> dict[str, Tensor]:
    """New v and o tensors of one layer, by slice or by the factored product per key-value head."""
    head_dim, d_vo = latent.original_head_dim, latent.d_vo_at(layer)
    w_v, b_v, w_o = source["v_proj.weight"], source.get("v_proj.bias"), source["o_proj.weight"]
    if latent.values == "slice":
        channels = (stride_channels("d_vo", d_vo, head_dim),)
        new = {
            "v_proj.weight": _take(w_v, channels, head_dim),
            "o_proj.weight": _take(w_o.T, channels, head_dim).T,
        }
        if b_v is not None:
            new["v_proj.bias"] = _take(b_v, channels, head_dim)
        return {name: tensor.contiguous() for name, tensor in new.items()}
    values, biases, outputs = [], [], []
    # [D, N * d] -> per key-value head [G * D, d], the output blocks of its query heads stacked.
    blocks = w_o.unflatten(1, (num_key_value_heads, -1, head_dim)).permute(1, 2, 0, 3).flatten(1, 2)
    for head, rows in enumerate(w_v.unflatten(0, (num_key_value_heads, head_dim))):
        bias = None if b_v is None else b_v.unflatten(0, (num_key_value_heads, head_dim))[head]
        value, new_bias, output = product_svd(rows, bias, blocks[head], d_vo)
        values.append(value)
        biases.append(new_bias)
        outputs.append(output.unflatten(0, (-1, w_o.shape[0])))
    new = {
        "v_proj.weight": torch.cat(values),
        "o_proj.weight": torch.cat(outputs).permute(1, 0, 2).flatten(1),
    }
    if b_v is not None:
        new["v_proj.bias"] = torch.cat(biases)
    return {name: tensor.to(w_v.dtype).contiguous() for name, tensor in new.items()}
