"""A tiny checkpoint and texts on disk, for tests of everything that starts from a directory."""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import SENTENCES

WORDS = " ".join(SENTENCES).replace(",", "").replace(".", "").split()
SETTINGS = (
    "conversion.preset=paper",
    "data.block_size=32",
    "lora.rank=2",
    "stage1.tokens=512",
    "stage2.tokens=512",
    "stage1.batch_size=4",
    "stage2.batch_size=4",
    "stage1.save_steps=2",
    "stage2.save_steps=2",
)
TOKENS = 2 * 4 * 32 * 4  # four optimiser steps a stage with SETTINGS


def write_checkpoint(folder: Path, tokenizer, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    """A random grouped-query Llama of head width 16, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            **overrides,
        }
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int = 150, seed: int = 0) -> Path:
    """Seeded nonsense of known words, one document between separators."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + "." for _ in range(documents)]
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
