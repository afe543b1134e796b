"""Bytes of the weights that an engine loads, by the files it loads them from, and how many tokens the model knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

__all__ = ["StoredWeights", "stored_weights"]


@dataclass(frozen=True)
class StoredWeights:
    """Args:
    total: bytes of all weights.
    read: of those that a step of decoding reads: all but embeddings that are not the head, too.
    vocabulary: entries of it.
    """

    total: int
    read: int
    vocabulary: int


def stored_weights(path: Path) -> StoredWeights:
    """Of a GGUF file, an OpenVINO directory, or a checkpoint's."""
    if path.suffix == ".gguf":
        return _of_gguf(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    vocabulary = config["vocab_size"]
    graph = path / "openvino_model.bin"
    if graph.is_file():
        total = graph.stat().st_size
        item = 4 if json.loads((path / "export.json").read_text())["export"]["weights"] == "f32" else 2
    else:
        total, item = _of_safetensors(path)
    looked_up = 0 if config.get("tie_word_embeddings") else vocabulary * config["hidden_size"] * item
    return StoredWeights(total, total - looked_up, vocabulary)


def _of_gguf(file: Path) -> StoredWeights:
    from gguf import GGUFReader

    tensors: dict[str, Any] = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    embeddings = tensors["token_embd.weight"]
    looked_up = int(embeddings.n_bytes) if "output.weight" in tensors else 0
    return StoredWeights(total, total - looked_up, int(embeddings.shape[1]))


def _of_safetensors(path: Path) -> tuple[int, int]:
    """Bytes of all, and of one number of the widest type."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
    total, item = 0, 1
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                part = weights.get_slice(name)
                size, numbers = sizes[part.get_dtype()], 1
                for length in part.get_shape():
                    numbers *= length
                total, item = total + numbers * size, max(item, size)
    return total, item
