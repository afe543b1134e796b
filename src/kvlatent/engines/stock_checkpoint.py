"""Export as a plain checkpoint of an upstream class, which every engine that reads such checkpoints runs as it is.

The rotary table goes into longrope's factors. Readers differ in which keys they look for and which of the factors they
take, so the config says the same in each: `rope_parameters`, and `rope_scaling` with `rope_theta`; short = long; the length at
which they change is the whole context; theta is what an engine falls back to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvlatent.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer, write_tokenizer
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.facts import engines_for
from kvlatent.engines.plain_weights import PlainShape, plain_shape, plain_weights
from kvlatent.engines.shared_table import BASE, frequency_factors
from kvlatent.model.families import family_of

__all__ = ["check_exportable", "matrix_rounding", "read_logits", "write_export"]

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_CARRIED = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *(
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ),
    *("tie_word_embeddings", "attention_dropout", "mlp_bias"),
)
_ENGINE = "transformers-stock"
_GENERATION = "generation_config.json"


def check_exportable(latent: Any, options: ExportOptions) -> int:
    """The context; raises `ValueError` where no plain checkpoint computes what the latent model does, see `plain_shape`."""
    return _shape(latent, options).context


def _shape(latent: Any, options: ExportOptions) -> PlainShape:
    return plain_shape(latent, "a plain checkpoint", _ENGINE, pad=options.pad)


def matrix_rounding(options: ExportOptions) -> None:
    """Matrices keep the type that they are stored in; see "tolerance" of the facts for what is folded into them."""


def write_export(latent: Any, source: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write config, weights, tokenizer and generation config; see `export_options` for the facts returned."""
    shape = _shape(latent, options)
    carrier = _carrier(latent.config)
    dtype = getattr(torch, options.stored_dtype)
    config_type, model_type = _CLASSES[carrier]
    config = config_type(**_settings(latent.config, carrier, shape))
    config.dtype = dtype
    with torch.device("meta"):
        model = model_type(config)
    state = plain_weights(latent, shape)
    for name, parameter in model.named_parameters():  # Llama has all four biases or none, Qwen2 has three
        if name.endswith(".bias"):
            state.setdefault(name, torch.zeros(parameter.shape))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(out)
    _add_older_keys(out / "config.json")
    if (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, out / _GENERATION)
    if has_tokenizer(source):
        write_tokenizer(load_tokenizer(source, config), out)
    return _facts(latent, shape, carrier, options)


def read_logits(out: Path, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of upstream's own class, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        return model.eval()(input_ids, use_cache=False).logits


def _carrier(config: Any) -> str:
    """The class that computes what the model does: Llama where there are no windows, else one that has them."""
    family = family_of(config)
    if family.qk_norm:
        return "qwen3"
    windows = [family.sliding_window(config, layer) for layer in range(config.num_hidden_layers)]
    same_window = len(set(windows)) == 1 and windows[0] is not None and not any(family.biases(config))
    if family.model_type == "mistral" or same_window:
        return "mistral"
    limit = config.max_position_embeddings
    return "qwen2" if any(window is not None and window < limit for window in windows) else "llama"


def _settings(config: Any, carrier: str, shape: PlainShape) -> dict[str, Any]:
    """What the plain config is made of."""
    family = family_of(config)
    settings = {name: getattr(config, name) for name in _CARRIED if hasattr(config, name)}
    settings |= {
        "head_dim": shape.key_width,
        "max_position_embeddings": shape.context,
        "rope_parameters": _rope(shape),
    }
    if carrier in ("llama", "qwen3"):
        settings["attention_bias"] = any(family.biases(config))
    if carrier == "mistral":
        settings["sliding_window"] = family.sliding_window(config, 0)
    if carrier in ("qwen2", "qwen3"):
        for name in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
            if hasattr(config, name):
                settings[name] = getattr(config, name)
        settings.setdefault("use_sliding_window", True)
    return settings


def _rope(shape: PlainShape) -> dict[str, Any]:
    factors = frequency_factors(shape.table.frequencies)
    return {
        "rope_type": "longrope",
        "rope_theta": BASE,
        "short_factor": factors,
        "long_factor": list(factors),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": shape.context,
    }


def _add_older_keys(path: Path) -> None:
    """Say the rotary table as readers before transformers 5 look for it, too: they take a plain one without a word."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _facts(latent: Any, shape: PlainShape, carrier: str, options: ExportOptions) -> dict[str, Any]:
    config, width = latent.config, shape.key_width
    heads, size = (
        config.num_key_value_heads * config.num_hidden_layers,
        getattr(torch, options.stored_dtype).itemsize,
    )
    engines = engines_for(width, width, "model", model_type=family_of(config).model_type)
    run_with = ["transformers chat DIR"]
    run_with += ["vllm serve DIR"] if "vllm" in engines else []
    # Weights are moved, not changed, unless something is folded into them and rounded to fewer bits.
    is_folded = shape.is_padded or any(scale != 1.0 for scales in shape.table.scales for scale in scales)
    return {
        "engine": f"transformers {transformers.__version__}, class {_CLASSES[carrier][1].__name__}",
        "cache_bytes_per_token": 2 * width * heads * size,
        "cache_dtype": options.stored_dtype,
        "context": shape.context,
        "changes": list(shape.changes),
        "run_with": run_with,
        "tolerance": 5e-2 if is_folded and options.stored_dtype != "float32" else 1e-4,
        "head_dim": width,
        "engines": list(engines),
    }
