"""Models as they are given to what measures them: a directory, a hub id, or loaded already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.checkpoints.gguf_files import describe_weights
from kvlatent.checkpoints.load import load_model
from kvlatent.jobs.devices import check_precision
from kvlatent.jobs.fingerprints import identity, model_fingerprint
from kvlatent.jobs.record import name_for_record

__all__ = ["ModelSource", "check_same_vocabulary", "name_and_fingerprint", "resolve_model"]

ModelSource = str | Path | PreTrainedModel


def resolve_model(source: ModelSource, dtype: str | None, device: str) -> PreTrainedModel:
    """The model; one that is loaded already stays as and where it is.

    Raises:
        ValueError: bfloat16 is asked of a device without units for it, or what `load_model` refuses.
    """
    if isinstance(source, PreTrainedModel):
        return source
    if dtype is not None:  # a checkpoint's own may be slow here, but nobody asked for speed
        check_precision(dtype, device)
    return load_model(source, dtype=dtype, device=device)


def name_and_fingerprint(model: PreTrainedModel, source: ModelSource) -> dict[str, str]:
    """Name (see `record.name_for_record`) and fingerprint: of the files where there are files, else of the weights.

    And "weights" for a GGUF file, see `describe_weights`.
    """
    loaded = isinstance(source, PreTrainedModel)
    name = getattr(model.config, "_name_or_path", "") if loaded else str(source)
    weights = None if loaded else describe_weights(source)
    return {
        "name": name_for_record(name) if name else type(model).__name__,
        "fingerprint": model_fingerprint(model) if loaded else identity(source),
        **({} if weights is None else {"weights": weights}),
    }


def check_same_vocabulary(one: Any, other: Any) -> None:
    """Raise `ValueError` unless both models have vocabularies of one size."""
    sizes = one.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"both models must read the same tokens: their vocabularies have {sizes[0]} and {sizes[1]} entries; compare "
            "with the model it came from"
        )
