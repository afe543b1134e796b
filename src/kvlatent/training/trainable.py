"""What is trained: the attention projections with their biases, and LoRA on the FFN (paper, Figure 1).

Why a module of its own: the LoRA wrappers live inside the plain model (a `PeftModel` under the Trainer would
save its adapters only and lose the attention at a resume), the trained weights are fp32 whatever the model's
type is, and the exported copy has neither wrappers nor fp32. None of these steps writes into a tensor that is
shared with the original.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.jobs.devices import resolve_precision
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.families import family_of
from kvlatent.model.family import Family

__all__ = ["merged_copy", "prepare_for_training", "shared_copy", "trainable_names", "trainable_state"]

ADAPTER = "default"


def prepare_for_training(
    model: PreTrainedModel, recipe: Recipe, generator: torch.Generator | None = None
) -> list[str]:
    """Freeze everything but the attention projections, add LoRA to the FFN, make what is trained fp32; in
    place.

    LoRA starts at zero effect and from `recipe.seed`, without touching the global random state. In
    float32 the frozen weights become fp32 copies too, otherwise they keep their type and
    storage.

    Args:
        model: a latent (or original) causal language model of a supported family, prepared once only.
        recipe: `lora`, `seed` and `dtype` are read.
        generator: draws LoRA's start, for a model that comes in parts; None: one of the recipe's seed.

    Returns:
        The names of the trained parameters, sorted, as in `model.named_parameters()`.

    Raises:
        ValueError: the model has been prepared already, or its family is not supported.
    """
    family = family_of(model.config)
    if recipe.dtype == "auto":
        recipe = resolve_precision(recipe, model.config, model.device)
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model already carries LoRA; prepare it once, or start from merged_copy(model)")
    model.requires_grad_(False)
    if recipe.lora.rank:
        _inject(model, recipe, family, generator or torch.Generator().manual_seed(recipe.seed))
    expected = set(trainable_names(model))
    replaced: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            trained = f"{path}.{name}" in expected
            if trained:
                data = parameter.detach().to(torch.float32, copy=True)
            elif recipe.dtype == "float32" and parameter.is_floating_point():
                data = parameter.detach().to(torch.float32)
            else:
                parameter.requires_grad_(False)
                continue
            tied = replaced.setdefault(id(parameter), nn.Parameter(data, requires_grad=trained))
            setattr(module, name, tied)
    return sorted(expected)


def trainable_names(model: PreTrainedModel) -> list[str]:
    """The parameters that both stages train, by rule (whether or not the model is prepared), sorted."""
    family = family_of(model.config)
    return sorted(name for name, _ in model.named_parameters() if _is_trained(name, family))


def _is_trained(name: str, family: Family) -> bool:
    parts = name.split(".")
    if any(part in ("lora_A", "lora_B") for part in parts):
        return True
    return len(parts) > 2 and parts[-3] == family.attention and parts[-2] in family.attention_modules


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a prepared model or decoder by name, detached, contiguous, on their device."""
    return {
        name: parameter.detach().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def merged_copy(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy for export: LoRA merged into plain linear layers, upstream's key names, the source's type.

    Unchanged tensors share their storage with `model`; merged and cast ones are new, so neither `model` nor
    the original that it shares with changes. Works on a model without LoRA as well.

    Args:
        model: a prepared model, before, between or after the stages.
        dtype: of every floating tensor; None: the type that the config names (`config.dtype`), else the
            embedding's.
    """
    chosen = dtype or model.config.dtype or next(model.get_input_embeddings().parameters()).dtype
    assert isinstance(chosen, torch.dtype)
    merged = shared_copy(model)
    for path, module in list(merged.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, name = path.rpartition(".")
            setattr(merged.get_submodule(parent), name, _merged_linear(module, chosen))
    _cast(merged, chosen)
    merged.__dict__.pop("peft_config", None)
    return merged.requires_grad_(False).eval()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in new modules and parameter objects on the same tensors."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def _inject(model: PreTrainedModel, recipe: Recipe, family: Family, generator: torch.Generator) -> None:
    """Wrap every linear layer of the FFN in a LoRA layer, drawn in order; experts, which are none, stay as they are."""
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    targets = [name for name in family.ffn_modules if name in names]
    if not targets:
        return
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(generator.get_state())
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        generator.set_state(torch.random.default_generator.get_state())


def _merged_linear(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """W + (alpha / rank) B A of a peft LoRA layer as a new linear layer, added in fp32, then cast.

    The wrapped layer keeps its tensors (peft's own merge would add into them).
    """
    base = layer.get_base_layer()
    weight = base.weight.detach().float() + layer.get_delta_weight(ADAPTER).detach().float()
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    merged.weight = nn.Parameter(weight.to(dtype))
    if base.bias is not None:
        merged.bias = base.bias
    return merged


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every floating parameter the type, replacing (never rewriting) tensors and keeping ties."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                setattr(module, name, replaced.setdefault(id(parameter), cast))
