"""Latent checkpoints written whole or not at all, with everything that loads them elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from kvlatent.checkpoints.self_check import SELF_CHECK, SelfCheck
from kvlatent.checkpoints.tokenizer_files import write_tokenizer
from kvlatent.checkpoints.weight_files import first_line
from kvlatent.checkpoints.wrapper_files import wrapper_of
from kvlatent.jobs.atomic import atomic_directory

__all__ = ["save"]


def save(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    card: str | None = None,
    files: dict[str, str] | None = None,
    inside: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a latent model as a loadable checkpoint, whole or not at all.

    The directory carries config, safetensors (sharded above `max_shard_size`), generation config, tokenizer with its
    chat template, the self-contained modelling file named by `auto_map`, what the model says to one prompt
    (`self_check`), a model card, and `files` (name -> text).

    A latent model may replace the directory that it was loaded from; an original is never written to.

    Args:
        inside: the checkpoint that `model` was loaded from or made of; where that is multimodal, `model` is the language model
            inside, and all else of it (towers, projectors, processors) is carried over. None writes `model` alone.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is false.
        ValueError: `out` is, holds or lies in the directory that `model`, or what it was converted from, was loaded from.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    out = Path(out)
    wrapper = None if inside is None else wrapper_of(str(inside))
    whole = model if wrapper is None else wrapper.with_language_model(model)
    with atomic_directory(out, overwrite=overwrite, inputs=_loaded_from(model, out)) as folder:
        try:
            whole.save_pretrained(folder, max_shard_size=max_shard_size)
        except SafetensorError as error:  # safetensors reports a full disk as its own error
            raise OSError(f"cannot write the weights to {out}: {first_line(error)}") from error
        if getattr(model.config, "kv_latent", None) and (check := SelfCheck.of(model)) is not None:
            (folder / SELF_CHECK).write_text(json.dumps(check.to_dict()) + "\n")
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder)
        if wrapper is not None:
            wrapper.carry_files(folder)
        for name, text in {**({} if card is None else {"README.md": card}), **(files or {})}.items():
            (folder / name).write_text(text)
    return out


def _loaded_from(model: PreTrainedModel, out: Path) -> dict[str, str]:
    """What a saved model must be apart from: its source, unless that is a latent checkpoint, saved where it was."""
    source = getattr(model.config, "_name_or_path", "")
    config = Path(source, "config.json")
    if not source or (
        out.resolve() == Path(source).resolve() and config.is_file() and "kv_latent" in config.read_text()
    ):
        return {}
    return {"model": source}
