"""Continue a text with a checkpoint: upstream's `generate` with a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.source import resolve_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.jobs.devices import choose_device
from kvlatent.model.sampling import sampling_options
from kvlatent.text.tokenise import check_token_ids

__all__ = ["continue_text", "generate_continuation"]

_SEEDS = 2**32


def continue_text(
    model: str | Path, prompt: str, *, device: str = "auto", dtype: str | None = None, **options: Any
) -> dict[str, str]:
    """{"prompt", "continuation"} by the checkpoint in a directory or on the hub.

    Args:
        dtype: to load in; None: the checkpoint's own.
        options: see `generate_continuation`, which raises what it raises.
    """
    loaded = resolve_model(model, dtype, choose_device(device))
    tokenizer = load_tokenizer(model, loaded.config)
    return {"prompt": prompt, "continuation": generate_continuation(loaded, tokenizer, prompt, **options)}


def generate_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that the model adds to `prompt`.

    Args:
        temperature: 0 takes the likeliest token each time; above 0 samples, repeatably for a seed.

    Raises:
        ValueError: the prompt is empty, a number is out of range, or prompt and continuation exceed the context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"at least one token has to be added: got max_new_tokens={max_new_tokens}; try 64")
    sampling = sampling_options(temperature)
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"a seed is between 0 and {_SEEDS - 1}: got {seed}; try 0")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("the prompt is empty: got 0 tokens; give at least one word")
    check_token_ids(int(inputs["input_ids"].max()), model.config.vocab_size, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"prompt and continuation must fit the context of {limit} tokens: got {length} + {max_new_tokens}; "
            "shorten the prompt or lower --max-new-tokens"
        )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        generator: Any = model  # upstream types `generate` as a tensor or module
        output = generator.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return str(tokenizer.decode(output[0, length:], skip_special_tokens=True))
