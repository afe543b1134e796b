"""A guess at how long work will take, from the model's size.

A training run's is printed, and made with the speed of one matrix product here and now. What is measured where nobody
chose must not hang on a clock, or two calls would not compare: it follows from the model's size and an assumed speed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kvlatent.jobs.devices import has_bfloat16_units
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.families import attention_layers_of, head_dim_of

__all__ = [
    "DEFAULT_SECONDS",
    "PROCESS_BYTES",
    "StreamCosts",
    "affordable",
    "assumed_speed",
    "estimate_seconds",
    "forward_operations",
    "layer_size",
    "listed",
    "rows_at_once",
    "stage_settings",
]

DEFAULT_SECONDS = 85.0
"""What a measurement that nobody sized may take by the estimate; two minutes, less loading and a slower machine."""

PROCESS_BYTES = 0.6e9
"""Of Python, torch and transformers."""

_SHARE_OF_PEAK = 0.4  # what training reaches of a plain matrix product's speed
# Softmax, rotation, norms and the rest cost a CPU as much per token and layer as this many more parameters would
# (measured on Llamas of width 32 and 128, one thread); it is what counts in tiny layers.
_PARAMETERS_OF_THE_REST = {"cpu": 100_000, "cuda": 0}
# Operations per second of a forward pass. Two cores were measured at 120e9 to 190e9 in fp32, at 40e9 in 16-bit formats
# that the processor has no products for, at 200e9 to 500e9 in those that it has.
_SPEEDS = {"cpu": (80e9, 40e9), "cuda": (5e12, 20e12)}
_BATCH_SECONDS, _BATCH_TOKENS = 3.0, 8192


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


@dataclass(frozen=True)
class StreamCosts:
    """What streamed work takes: `memory_bytes` at its peak, `disk_bytes` beside the checkpoint, `seconds`."""

    memory_bytes: float
    disk_bytes: float
    seconds: float

    def sentence(self) -> str:
        """For people."""
        time = (
            f"{self.seconds / 60:,.0f} minutes"
            if self.seconds < 5400
            else f"{self.seconds / 3600:,.1f} hours"
        )
        return (
            f"predicted: {self.memory_bytes / 1e9:,.1f} GB of memory, {self.disk_bytes / 1e9:,.1f} GB on the disk of the output, about "
            f"{time}"
        )


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
        again = 2 if section.activation_checkpointing and stage == 2 else 0
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


def forward_operations(model: Any, tokens: int, *, scored: bool = False) -> float:
    """Operations of one forward pass over a sequence of so many tokens.

    Two per parameter of the layers and token, and four per query, visible key and channel for scores and values.

    Args:
        model: a loaded causal model, original or latent; its attention counts with the full head width.
        tokens: of the sequence.
        scored: logits of all tokens are computed, not of a few at the end.
    """
    config, decoder = model.config, model.get_decoder()
    layers = config.num_hidden_layers
    size = sum(p.numel() for p in decoder.parameters()) - decoder.get_input_embeddings().weight.numel()
    size += layers * _PARAMETERS_OF_THE_REST.get(model.device.type, 0)
    if scored:
        size += model.get_output_embeddings().weight.numel()
    seen = _attention_layers(config) * config.num_attention_heads * head_dim_of(config) * tokens / 2
    return tokens * (2.0 * size + 4.0 * seen)


def _attention_layers(config: Any) -> int:
    """How many layers have attention: all, where the family is unknown, since any model's time is estimated."""
    try:
        return len(attention_layers_of(config))
    except ValueError:
        return config.num_hidden_layers


def assumed_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that forward passes are taken to reach on a device: of two cores, where it is a CPU."""
    wide, narrow = _SPEEDS.get(device.type, _SPEEDS["cpu"])
    if device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16_units(device):
        narrow = wide
    return wide if dtype == torch.float32 else narrow


def rows_at_once(model: Any, length: int, most: int, *, scored: bool = False) -> int:
    """Sequences of `length` tokens to read together: `most`, or as few as keep a batch to 8,192 tokens and 3 seconds."""
    operations = forward_operations(model, length, scored=scored)
    in_time = int(_BATCH_SECONDS * assumed_speed(model.device, model.dtype) / operations)
    return max(1, min(most, _BATCH_TOKENS // length, in_time))


def affordable(levels: Mapping[str, Sequence[float]], seconds: float) -> dict[str, int]:
    """How far each of several measurements can be extended so that all of them together take no longer.

    The cheapest extension goes first, so that no measurement starves another; all stay at their first level where
    even those take longer.

    Args:
        levels: of each measurement, the seconds of its extents, ascending.

    Returns:
        The index of an extent for each.
    """
    at = dict.fromkeys(levels, 0)
    total = sum(costs[0] for costs in levels.values())
    while True:
        nexts = [
            (costs[at[name] + 1], name)
            for name, costs in levels.items()
            if at[name] + 1 < len(costs) and total - costs[at[name]] + costs[at[name] + 1] <= seconds
        ]
        if not nexts:
            return at
        cost, name = min(nexts)
        total += cost - levels[name][at[name]]
        at[name] += 1


def listed(numbers: Sequence[int]) -> str:
    """Numbers in a sentence."""
    *most, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(most)} and {last}" if most else last
