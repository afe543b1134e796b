"""What makes two runs the same: hashes of files, models and plans, and what differs between two plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["differences", "fingerprint", "identity", "model_fingerprint"]

_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def fingerprint(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def identity(source: str | Path) -> str:
    """SHA-256 of what a path holds: a file's content, or the names and contents of a checkpoint's files.

    A name that is no local path (a hub id) stands for itself.
    """
    path = Path(source)
    if path.is_file():
        return _sha256(path)
    if not path.is_dir():
        return f"hub:{source}"
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    return fingerprint({file.name: _sha256(file) for file in files})


def _sha256(path: Path) -> str:
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


def model_fingerprint(model: Any) -> str:
    """Hash of a model's shape, its rotary settings and a sample of every weight; equal for equal checkpoints.

    The sample is 64 evenly spaced entries a tensor, cast to float32, so a checkpoint loaded in another dtype than it
    was calibrated in is another model.
    """
    config = model.config
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    about = {name: getattr(config, name) for name in names} | {"rope": config.rope_parameters}
    about |= {name: getattr(config, name, None) for name in ("sliding_window", "layer_types", "rms_norm_eps")}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(name.encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
