"""What makes two runs the same: hashes of files, tokenizers, texts, models and plans, and what differs between two plans.

Hashes of models and blocks are of cheap samples, so that they can be taken at every start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "blocks_fingerprint",
    "differences",
    "file_sha256",
    "fingerprint",
    "identity",
    "model_fingerprint",
    "sampled_entries",
    "sampled_fingerprint",
    "template_fingerprint",
    "tokenizer_fingerprint",
    "tokenizer_state",
    "weights_fingerprints",
]

_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.gguf")


def fingerprint(plan: Any) -> str:
    """SHA-256 of something JSON-able, independent of the order of keys."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def identity(source: str | Path) -> str:
    """SHA-256 of what a path holds: a file's content, or the names and contents of a checkpoint's files.

    A name that is no local path (a hub id) stands for itself.
    """
    path = Path(source)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return f"hub:{source}"
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    return fingerprint({file.name: file_sha256(file) for file in files})


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two nested mappings, one `section.key (old, now new)` each."""
    found: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} ({_short(before)}, now {_short(after)})")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, merges and normalisation of a tokenizer, without what its last call left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for transient in ("truncation", "padding"):
        state.pop(transient, None)
    return state


def tokenizer_fingerprint(tokenizer: Any, frame: tuple[list[int], list[int]]) -> str:
    """Hash of what decides the ids of a text; `frame` are the ids put before and after every document."""
    return fingerprint([type(tokenizer).__name__, frame, tokenizer_state(tokenizer)])


def template_fingerprint(tokenizer: Any) -> str | None:
    """Hash of what decides how conversations are written as text; None without a chat template."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    described = json.dumps([template, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def model_fingerprint(model: Any) -> str:
    """Hash of a model's shape, its rotary settings and a sample of every weight; equal for equal checkpoints.

    The sample is 64 evenly spaced entries a tensor, cast to float32, so a checkpoint loaded in another dtype than it
    was calibrated in is another model.
    """
    state = model.state_dict()
    return sampled_fingerprint(
        model.config, {name: partial(_sample, tensor) for name, tensor in state.items()}
    )


def sampled_fingerprint(config: Any, samples: Mapping[str, Callable[[], Any]]) -> str:
    """As `model_fingerprint`, of a model's config and of what gives the sample of each of its tensors."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    about = {name: getattr(config, name, None) for name in names} | {
        "rope": getattr(config, "rope_parameters", None)
    }
    about |= {name: getattr(config, name, None) for name in ("sliding_window", "layer_types", "rms_norm_eps")}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, sample in sorted(samples.items()):
        digest.update(name.encode())
        digest.update(sample().float().numpy().tobytes())
    return digest.hexdigest()


def sampled_entries(count: int) -> range:
    """Which of so many entries of a tensor its fingerprint goes by."""
    step = max(1, count // 64)
    return range(0, min(count, 64 * step), step)


def weights_fingerprints(model: Any) -> dict[str, str]:
    """Hashes of the names and shapes of what a model trains ("trained"), and of what it does not with samples ("frozen")."""
    frozen, trained = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.update(f"{name} {tuple(parameter.shape)};".encode())
        else:
            frozen.update(f"{name} {tuple(parameter.shape)} {_sample(parameter).tolist()};".encode())
    return {"trained": trained.hexdigest(), "frozen": frozen.hexdigest()}


def _sample(tensor: Any) -> Any:
    """64 evenly spaced entries in float32, on the CPU."""
    flat = tensor.detach().flatten()
    entries = sampled_entries(flat.numel())
    return flat[entries.start : entries.stop : entries.step].float().cpu()


def blocks_fingerprint(blocks: Any) -> str:
    """Hash of the token ids of 64 evenly spaced blocks."""
    digest = hashlib.sha256()
    for index in range(0, len(blocks), max(1, len(blocks) // 64)):
        digest.update(np.asarray(blocks[index]["input_ids"]).tobytes())
    return digest.hexdigest()
