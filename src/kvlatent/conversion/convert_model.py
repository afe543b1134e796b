"""From a pretrained model and widths to a latent model; the original stays untouched.

`choose` decides what is kept, `attention_weights` computes the narrow weights in closed form, `refinement` tunes them on the
calibration text. Only attention projections are new tensors; everything else shares storage with the original.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.conversion.attention_weights import attention_weights
from kvlatent.conversion.text_tuning import tune_on_text
from kvlatent.jobs.devices import check_product_dtype, faster_dtype
from kvlatent.jobs.progress import Progress
from kvlatent.model.assembly import assemble, full_width, original_attention
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of, effective_table, family_of, head_dim_of
from kvlatent.model.family import Family
from kvlatent.model.finite import check_finite_weights
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.widths import Width
from kvlatent.model.wrappers import text_model_of, with_text_model
from kvlatent.selection.attention_rows import pair_layout
from kvlatent.selection.choices import BLIND, BY_PAIRS, NO_DATA, Choices, resolve_choices, without_statistics
from kvlatent.selection.latent_config import build_latent_config, check_widths
from kvlatent.selection.pairs import Pairs, choose_pairs, strongest_pairs
from kvlatent.selection.statistics import LayerStatistics, Statistics
from kvlatent.selection.unrotated import selected_where_maps_have_no_place

__all__ = ["convert", "weight_energy"]

_ROWS = 256


def convert(
    model: PreTrainedModel,
    config: LatentConfig | None = None,
    *,
    d_qk: Width | None = None,
    d_vo: Width | None = None,
    preset: str = "calibrated",
    keys: str | None = None,
    frequencies: str | None = None,
    values: str | None = None,
    table: str | None = None,
    align: int | None = None,
    gains: bool | None = None,
    refit: bool | None = None,
    global_steps: int | None = None,
    qk_norm: str = "full",
    choices: Choices | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | Callable[[str, int, int], None] | None = None,
) -> PreTrainedModel:
    """A latent copy of `model`; unchanged tensors share storage with it, none of its own is modified.

    Args:
        model: a causal language model of a supported family, or a multimodal one around such: its language model is
            converted, the rest carried over.
        config: a finished latent config; otherwise one is made from the arguments that follow (see `choose`). With
            `statistics`, gains, refit and alignment follow `choices` or the preset all the same.
        d_qk, d_vo: widths; the side left out keeps its full width.
        preset: "calibrated" (default; falls back to the weights alone without `statistics`), "own-frequency" or "paper";
            a warning says what it costs to look at no text; `keys`, `frequencies`, `values`, `table`, `align`, `gains`, `refit`,
            `global_steps` replace single choices,
            `choices` all of them (see `Choices`).
        qk_norm: see `choose`.
        statistics: from `calibrate`, of this model.
        seed: of the sampling in alignment.
        precision: of the products while layers are tuned, "float32", "bfloat16" or "auto", which is the faster of both on
            the device; sums and weights stay in float32 or float64.
        progress: told of every step; a function is called with its name, how much of it is done, and of how much.

    Raises:
        ValueError: the architecture is not supported, a weight is not finite, the widths do not fit, or the statistics
            are of another model.
    """
    wrapper, model = model, text_model_of(model)
    family, head_dim = family_of(model.config), head_dim_of(model.config)
    by_preset = choices is None
    if choices is None:
        choices = resolve_choices(
            preset,
            keys,
            frequencies,
            values,
            table=table,
            align=align,
            gains=gains,
            refit=refit,
            global_steps=global_steps,
        )
    _check_source(model, config, family, head_dim)
    faster = faster_dtype(model.config, model.device)
    dtype = faster if precision == "auto" else check_product_dtype(precision, model.device)
    widths = check_widths(
        model.config, head_dim if d_qk is None else d_qk, head_dim if d_vo is None else d_vo
    )
    narrow = config is None and widths != (head_dim, head_dim)
    check_finite_weights(model)
    if statistics is not None:
        statistics.check(model)
    elif choices.needs_statistics:
        choices = without_statistics(choices)
        if narrow:
            warnings.warn(NO_DATA, stacklevel=2)
    elif narrow and by_preset:  # who spells out the choices has a plan, which says it
        warnings.warn(BLIND, stacklevel=2)
    if config is not None and config.values == "whitened" and statistics is None:
        raise ValueError(
            'the latent config has values="whitened", which are computed from text: got statistics=None; pass '
            "statistics=calibrate(model, ...), or choose(...) with values=svd"
        )
    if config is None:
        known = () if statistics is None else statistics.layers
        idle = {layer.unrotated_keys.shape[-1] for layer in known}
        choices = selected_where_maps_have_no_place(choices, idle, qk_norm)
        pairs = _choose_pairs(model, widths.d_qk, choices, statistics) if narrow else None
        config = build_latent_config(model.config, widths, choices, qk_norm=qk_norm, pairs=pairs)
    _check_source(model, config, family, head_dim)
    with torch.inference_mode(False):  # which also turns gradients on where the caller turned them off
        latent = assemble(model, config, _weights(model, family, config, choices, statistics))
        if statistics is not None:
            told = Progress.of(progress, ("step", "done", "total"))
            tune_on_text(model, latent, statistics, choices, seed=seed, dtype=dtype, progress=told)
    return latent if wrapper is model else with_text_model(wrapper, latent)


def _weights(
    model: Any, family: Family, config: LatentConfig, choices: Choices, statistics: Statistics | None
) -> Callable[[int], dict[str, Tensor]]:
    """The closed-form attention tensors of a layer."""
    of_layer: dict[int, LayerStatistics] = {}
    if statistics is not None:
        of_layer = dict(zip(attention_layers_of(model.config), statistics.layers, strict=True))

    def weights(index: int) -> dict[str, Tensor]:
        return attention_weights(
            original_attention(model, index),
            family,
            model.config,
            config,
            index,
            statistics=of_layer.get(index),
            gains=choices.gains,
        )

    return weights


def _choose_pairs(
    model: Any, d_qk: int | tuple[int, ...], choices: Choices, statistics: Statistics | None
) -> Pairs | None:
    """Kept channel pairs where statistics or weights name them, else None."""
    if choices.keys not in BY_PAIRS:
        return None
    if choices.keys != "weights":
        assert statistics is not None, "without_statistics replaced the others"
        factored = choices.unrotated == "factored"
        return choose_pairs(statistics, d_qk, choices.table, choices.keys, factored=factored)
    return strongest_pairs(_weight_energies(model), d_qk, choices.table)


def _weight_energies(model: Any) -> list[Tensor]:
    """E|q_j|^2 E|k_j|^2 [K, P] a layer, from the weights alone, as if normalised inputs were white."""
    decoder = full_width(model).get_decoder()
    return [
        weight_energy(decoder, index, effective_table(model.config, index).rotary_dim)
        for index in attention_layers_of(model.config)
    ]


def weight_energy(decoder: Any, index: int, rotary_dim: int) -> Tensor:
    """What `strongest_pairs` goes by in one layer of a full-width twin: [K, P]."""
    attention, attention_norm, *_ = parts_of(decoder, index)
    offset, sides = family_of(decoder.config).norm_offset, []
    for part, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
        weight, bias = _weight_and_bias(attention, part)
        gain = getattr(attention_norm, "weight", weight.new_ones(()) - offset).float() + offset
        # Some rows at a time: tensors of the weight's size cost more to make room for than to fill.
        rows = torch.cat([(some.float() * gain).square_().sum(1) for some in weight.split(_ROWS)])
        rows = (rows if bias is None else rows + bias.float().square()).unflatten(0, (-1, attention.d_qk))
        if norm is not None:
            mean = rows.mean() if attention.norms_all_heads else rows.mean(1, keepdim=True)
            rows = rows / mean * (norm.weight.float() + offset).square().view(-1, attention.d_qk)
        first, second = pair_layout(rows, rotary_dim)
        sides.append(first + second)
    queries, keys = sides
    return queries.unflatten(0, (len(keys), -1)).sum(1) * keys


def _weight_and_bias(attention: Any, part: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of "q" or "k" of a full-width latent attention."""
    weight, *bias = (parameter.detach()[rows] for parameter, rows in attention.parameters_of(part))
    return weight, bias[0] if bias else None


def _check_source(model: Any, config: LatentConfig | None, family: Family, head_dim: int) -> None:
    """Raise `ValueError` unless the config was made for this model, and the model is a causal language model."""
    if not isinstance(model, family.upstream("ForCausalLM")):
        raise ValueError(  # noqa: TRY004 - the command line shows ValueError as one sentence
            f"convert needs a {family.prefix}ForCausalLM: got {type(model).__name__}; load the checkpoint with "
            "AutoModelForCausalLM"
        )
    if config is None:
        return
    made_for = (config.original_model_type, config.original_head_dim)
    if made_for != (family.model_type, head_dim) or (config.qk_norm == "none") == bool(family.qk_norm):
        raise ValueError(
            f"the latent config was made for {made_for[0]} with head_dim={made_for[1]}, qk_norm={config.qk_norm}: got "
            f"{family.model_type} with head_dim={head_dim}; make one with choose(model.config, ...)"
        )
