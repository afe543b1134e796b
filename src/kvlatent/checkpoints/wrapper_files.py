"""A language model that was loaded out of a multimodal checkpoint, put back among the files of that checkpoint.

Whatever is not the language model's is read off the files again, tensor by tensor and in the dtype that it is stored in: what
was converted may have been loaded in another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from kvlatent.checkpoints.load import load_whole_config
from kvlatent.checkpoints.named_weights import NamedWeights
from kvlatent.checkpoints.shard_output import carry_files, write_shard
from kvlatent.checkpoints.sharded import ShardedWeights, open_sharded
from kvlatent.model.families import LATENT_PREFIX
from kvlatent.model.wrapper_classes import wrapper_classes
from kvlatent.model.wrappers import (
    empty_wrapper,
    is_wrapper,
    language_model_of,
    register_wrapper,
    text_places,
    upstream_wrapper,
    with_text_model,
)

__all__ = ["WrapperFiles", "check_no_wrapper", "wrapper_of"]

_ALONE = "in Python, write the language model inside with kvlatent.save(kvlatent.load_model(DIR), OUT, tokenizer=...), and give OUT"
_OUTSIDE = "model-outside.safetensors"
"""The shard of what is not the language model's, where a conversion was streamed."""


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
        empty = self._empty()
        empty.load_state_dict(self._outside(empty), strict=False, assign=True)
        whole = with_text_model(empty, latent)
        register_wrapper(whole.config.model_type)  # tokenizers are looked for by it
        return whole

    def open_language_model(self) -> ShardedWeights:
        """The tensors of the language model under the names that it has alone, to be written under those it has here.

        Raises:
            ValueError: see `open_sharded`; or a tensor is not stored as it is held.
        """
        empty = self._empty()
        text, named = language_model_of(empty), self._named(empty)
        places, names = text_places(empty, text), {}
        for own, place in places.items():
            for name in named.names_from(f"{place}."):
                if (source := named.stored_name(name)) is None:
                    raise ValueError(
                        f"a language model is streamed out of a multimodal checkpoint whose tensors are stored as they are held: got "
                        f"{self.source}, where {name} is made of several; leave --stream out"
                    )
                names[own + name.removeprefix(place)] = source
        return named.weights.renamed(names, places)

    def write_outside(self, folder: Path, latent: Any) -> Any:
        """Write what is not the language model's as a shard of its own into `folder`; the whole model, without weights.

        Args:
            latent: the language model; its weights may be elsewhere.
        """
        empty = self._empty()
        write_shard(self._outside(empty), folder / _OUTSIDE)
        whole = empty_wrapper(empty, latent)
        whole.config.dtype = latent.config.dtype
        register_wrapper(whole.config.model_type)
        return whole

    def outside_bytes(self) -> int:
        """Of what `write_outside` writes."""
        empty = self._empty()
        return self._named(empty).num_bytes(self._names_outside(empty))

    def carry_files(self, folder: Path) -> None:
        """Copy what lies beside the weights (processors, licences) and is not in `folder` yet."""
        carry_files(self._folder(), folder)

    def _empty(self) -> Any:
        """The multimodal model without weights."""
        base = upstream_wrapper(str(self.config.model_type).removeprefix(LATENT_PREFIX))
        kind = wrapper_classes(base)[1] if self.config.model_type.startswith(LATENT_PREFIX) else base
        with torch.device("meta"):
            return kind(self.config)

    def _named(self, empty: Any) -> NamedWeights:
        return NamedWeights(open_sharded(self._folder(), self.config), empty)

    def _outside(self, empty: Any) -> dict[str, Tensor]:
        """What is not the language model's, as it is stored."""
        named, names = self._named(empty), self._names_outside(empty)
        lacking = [name for name in names if name not in named]
        if lacking:
            raise ValueError(
                f"the weights of {self.source} do not fit its config: {len(lacking)} missing tensors, e.g. {lacking[0]}; "
                "download the checkpoint again"
            )
        return {name: named.read(name) for name in names}

    @staticmethod
    def _names_outside(empty: Any) -> list[str]:
        places = text_places(empty, language_model_of(empty)).values()
        inside = tuple(f"{place}." for place in places)
        return sorted(name for name in empty.state_dict() if not name.startswith(inside))

    def _folder(self) -> Path:
        """The directory, or that of a hub id in the cache."""
        local = Path(self.source)
        return local if local.is_dir() else Path(snapshot_download(str(self.source)))


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
