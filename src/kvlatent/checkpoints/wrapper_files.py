"""A language model that was loaded out of a multimodal checkpoint, put back among the files of that checkpoint.

Whatever is not the language model's is read off the files again, tensor by tensor and in the dtype that it is stored in: what
was converted may have been loaded in another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from kvlatent.checkpoints.load import load_whole_config
from kvlatent.checkpoints.named_weights import NamedWeights
from kvlatent.checkpoints.shard_output import carry_files
from kvlatent.checkpoints.sharded import open_sharded
from kvlatent.model.families import LATENT_PREFIX
from kvlatent.model.wrapper_classes import wrapper_classes
from kvlatent.model.wrappers import is_wrapper, register_wrapper, upstream_wrapper, with_text_model

__all__ = ["WrapperFiles", "check_no_wrapper", "wrapper_of"]

_ALONE = "in Python, write the language model inside with kvlatent.save(kvlatent.load_model(DIR), OUT, tokenizer=...), and give OUT"


class WrapperFiles:
    """A multimodal checkpoint, original or latent.

    Args:
        source: directory or hub id.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self.config = load_whole_config(str(source))

    def with_language_model(self, latent: Any) -> Any:
        """The multimodal model around a latent language model: to be saved, since buffers that no file holds are not there.

        Raises:
            ValueError: files are damaged, or their tensors are not those of the model.
        """
        base = upstream_wrapper(str(self.config.model_type).removeprefix(LATENT_PREFIX))
        kind = wrapper_classes(base)[1] if self.config.model_type.startswith(LATENT_PREFIX) else base
        with torch.device("meta"):
            empty = kind(self.config)
        weights = NamedWeights(open_sharded(self._folder(), self.config), empty)
        inside = tuple(f"{name}." for name, each in empty.named_modules() if each in _language_modules(empty))
        outside = {name for name in empty.state_dict() if not name.startswith(inside)}
        lacking = sorted(name for name in outside if name not in weights)
        if lacking:
            raise ValueError(
                f"the weights of {self.source} do not fit its config: {len(lacking)} missing tensors, e.g. {lacking[0]}; "
                "download the checkpoint again"
            )
        empty.load_state_dict({name: weights.read(name) for name in outside}, strict=False, assign=True)
        whole = with_text_model(empty, latent)
        register_wrapper(whole.config.model_type)  # tokenizers are looked for by it
        return whole

    def carry_files(self, folder: Path) -> None:
        """Copy what lies beside the weights (processors, licences) and is not in `folder` yet."""
        carry_files(self._folder(), folder)

    def _folder(self) -> Path:
        """The directory, or that of a hub id in the cache."""
        local = Path(self.source)
        return local if local.is_dir() else Path(snapshot_download(str(self.source)))


def _language_modules(model: Any) -> tuple[Any, ...]:
    return model.get_decoder(), model.get_output_embeddings()


def wrapper_of(source: str | Path) -> WrapperFiles | None:
    """The multimodal checkpoint that `source` is; None where it is a language model alone, or a GGUF file."""
    files = WrapperFiles(source)
    return files if is_wrapper(files.config) else None


def check_no_wrapper(source: str | Path, who: str, step: str = _ALONE) -> None:
    """Raise `ValueError` where `source` is multimodal, which is not what `who` does (a subject and a verb, "an export is of").

    Args:
        step: what to do instead.
    """
    if (files := wrapper_of(source)) is not None:
        raise ValueError(
            f"{who} a language model alone: got {source}, a multimodal checkpoint (model_type {files.config.model_type!r}); "
            f"{step}"
        )
