"""A guess at how long a run will take, from the model's size and the speed of one matrix product here and now."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .recipe import Recipe

__all__ = ["estimate_seconds", "layer_size", "stage_settings"]

_SHARE_OF_PEAK = 0.4  # what training reaches of a plain matrix product's speed
# Softmax, rotation, norms and the rest cost a CPU as much per token and layer as this many more parameters would
# (measured on Llamas of width 32 and 128, one thread); it is what counts in tiny layers.
_PARAMETERS_OF_THE_REST = {"cpu": 100_000, "cuda": 0}


def stage_settings(recipe: Recipe, stage: int) -> Any:
    """The recipe's section of stage 1 or 2."""
    return recipe.stage1 if stage == 1 else recipe.stage2


def layer_size(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of a model's layers, and of its head; nothing is allocated.

    Raises:
        ValueError: no model can be built with the config's sizes.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"no {config.model_type} can be built with the sizes in its config.json ({error}); download it again"
        ) from error
    head = model.get_output_embeddings().weight.numel()
    tied = getattr(config, "tie_word_embeddings", False)
    embeddings = model.get_input_embeddings().weight.numel() + (0 if tied else head)
    return sum(p.numel() for p in model.parameters()) - embeddings, head


def estimate_seconds(
    recipe: Recipe, stages: tuple[int, ...], size: int, head: int, layers: int, device: str
) -> float:
    """A rough guess at the training time: operations, over the measured speed of one matrix product.

    A forward pass costs two operations per parameter and token, forward and backward six; stage I and a loss that
    looks at the original add the original's forward. Loading, data and evaluation are not in it.
    """
    size += layers * _PARAMETERS_OF_THE_REST[device]
    operations = 0.0
    for stage in stages:
        section = stage_settings(recipe, stage)
        teacher = stage == 1 or section.objective != "next_token"
        again = 2 if section.activation_checkpointing else 0
        per_token = (6 + again + 2 * teacher) * (size + (head if stage == 2 else 0))
        operations += float(section.tokens) * per_token
    return operations / (_SHARE_OF_PEAK * _matmul_speed(device, recipe.dtype)) if stages else 0.0


def _matmul_speed(device: str, dtype: str) -> float:
    """Floating-point operations per second of a 512 x 1024 x 1024 product here and now, best of ten."""
    left = torch.ones(512, 1024, device=device, dtype=getattr(torch, dtype))
    right = torch.ones(1024, 1024, device=device, dtype=left.dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / best
