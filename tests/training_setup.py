"""Tiny models, blocks and recipes that the training tests share."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent.selection.choices import PAPER
from kvlatent.training.stages import train_stage

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, head_dim=16),
    "llama-tied": lambda: LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**SIZES | {"hidden_size": 64}),
}


def original(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model with perturbed norms and biases, so that no part of it is neutral."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "self_attn" in name:
                parameter.mul_(6)  # attention that matters
    model.config.dtype = dtype
    return model.to(dtype).eval()


def student_of(teacher: PreTrainedModel, width: int = 8) -> PreTrainedModel:
    """The latent model of half the cache (16 channels a head, 8 kept)."""
    return convert(teacher, d_qk=width, d_vo=width, choices=PAPER)


def blocks(count: int = 24, length: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Two documents a block, labels shifted, none at a document's end."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(1, SIZES["vocab_size"], (length,), generator=generator)
        ids[1::2] = (ids[::2] * 7 + 3) % (SIZES["vocab_size"] - 1) + 1  # half of the tokens can be learnt
        cut = int(torch.randint(3, length - 3, (), generator=generator))
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[cut - 1] = -100
        positions = torch.cat([torch.arange(cut), torch.arange(length - cut)])
        rows.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    return rows


def recipe(*overrides: str) -> Recipe:
    """Few steps: 8 of 2 x 2 blocks of 16 tokens in each stage, a checkpoint every 3."""
    small = ["lora.rank=4", "lora.alpha=8", "stage2.objective=mix"]
    for stage in ("stage1", "stage2"):
        small += [f"{stage}.{item}" for item in (
            "tokens=512", "batch_size=2", "gradient_accumulation=2", "learning_rate=0.01", "save_steps=3",
        )]  # fmt: skip
    return Recipe.load(None, [*small, *overrides])


def hashes(module: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and buffer."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: digest(tensor) for name, tensor in state.items()}


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def run(student, teacher, stage, path, config, rows=None, **options):
    """`train_stage` on the CPU, on `blocks()` unless told otherwise."""
    return train_stage(student, teacher, stage, rows or blocks(), config, path, device="cpu", **options)
