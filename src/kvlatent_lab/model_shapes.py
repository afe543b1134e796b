"""Models of well-known shapes with random weights: what they compute means nothing, what it takes is the real thing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvlatent.conversion.convert_model import convert
from kvlatent.model.families import head_dim_of
from kvlatent.model.widths import Width
from kvlatent.selection.choices import Choices

__all__ = ["SHAPES", "random_pair"]

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-3-70b": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}
"""Fields of a Llama's config, as its authors published them."""


def random_pair(
    shape: str | Mapping[str, Any],
    d_qk: Width,
    d_vo: Width,
    *,
    layers: int | None = None,
    context: int | None = None,
    table: str = "head",
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An original with random weights, made on the device, and its latent model, which shares all but the attention.

    Args:
        shape: a key of `SHAPES`, or fields of a `LlamaConfig`.
        d_qk, d_vo: widths of the latent model, one number or one per layer.
        layers: as many layers only; None takes all. A step's time is that of the layers and of the head.
        context: longest sequence, tokens, where it should be more than the shape's; speed depends on it in no other way.
        table: who shares a rotary table: "head" (as the preset "calibrated" does, the most work), "layer" or "model".
        dtype, device: of both.
        seed: of the weights.

    Returns:
        Original and latent model, in evaluation mode.

    Raises:
        ValueError: an unknown shape, or widths or a table that do not fit.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        near = get_close_matches(shape.lower(), SHAPES, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown shape {shape!r}; {hint}choose one of {', '.join(SHAPES)}")
    fields = copy.deepcopy(
        dict(SHAPES[shape] if isinstance(shape, str) else shape)
    )  # upstream writes into them
    if layers is not None:
        fields["num_hidden_layers"] = layers
    if context is not None:
        fields["max_position_embeddings"] = context
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), where:
        torch.manual_seed(seed)
        original = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=getattr(torch, dtype))
    original.eval().requires_grad_(False)
    sides = [d_vo] if isinstance(d_vo, int) else d_vo
    plain = all(head_dim_of(original.config) % width == 0 for width in sides)  # slicing is quick
    choices = Choices(keys="weights", values="slice" if plain else "svd", table=table)
    return original, convert(original, d_qk=d_qk, d_vo=d_vo, choices=choices).requires_grad_(False)
