"""A checkpoint written shard by shard, each of them whole or not there, and then everything that is no weight.

A shard holds what was computed together, a decoder layer for one; the index that joins them is read off their headers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from kvlatent.checkpoints.registration import SELF_CHECK
from kvlatent.checkpoints.tokenizer_files import write_tokenizer
from kvlatent.checkpoints.weight_files import first_line, read_header
from kvlatent.jobs.atomic import write_atomically

__all__ = ["carry_files", "finish_checkpoint", "shard_name", "write_shard"]

# Not carried: weights in any form, what is written anew, and code, which would be another model's.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_ANEW = ("config.json", "README.md", "run.json", "recipe.yaml", "metrics.jsonl", SELF_CHECK)


def shard_name(number: int, count: int) -> str:
    """What upstream calls the shard of that number, from 0, of so many."""
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def write_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file that is there whole or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        write_atomically(path, lambda file: save_file(dict(tensors), file, metadata={"format": "pt"}))
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(f"cannot write the weights to {path}: {first_line(error)}") from error


def finish_checkpoint(
    folder: Path, model: Any, source: Path, tokenizer: Any, files: Mapping[str, str]
) -> None:
    """Put beside the shards in `folder` what makes them a checkpoint that loads with and without kvlatent.

    Args:
        model: latent, without weights; its config is written.
        source: directory of the original, whose other files come along.
        tokenizer: of the original.
        files: name -> text, written last.
    """
    _write_index(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    model.generation_config.save_pretrained(folder)
    model.add_code(folder, model.config)
    write_tokenizer(tokenizer, folder)
    carry_files(source, folder)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def carry_files(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights of a checkpoint (licences, templates, processors) and is not in `folder` yet."""
    for file in sorted(source.iterdir()):
        known = file.name in _ANEW or file.name.startswith(".") or (folder / file.name).exists()
        if file.is_file() and not known and not file.name.endswith((*_WEIGHTS, ".py")):
            shutil.copyfile(file, folder / file.name)


def _write_index(folder: Path) -> None:
    """Write the index of all shards, as upstream does."""
    listed: dict[str, str] = {}
    total_bytes = total = 0
    for shard in sorted(folder.glob("*.safetensors")):
        tensors, _ = read_header(shard)
        listed |= dict.fromkeys(tensors, shard.name)
        total_bytes += sum(end - start for start, end in (info.data_offsets for info in tensors.values()))
        total += sum(info.parameter_count for info in tensors.values())
    index = {"metadata": {"total_parameters": total, "total_size": total_bytes}, "weight_map": listed}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
