"""What a bench is given, checked before anything is measured: sizes, and models that belong together."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from kvlatent.checkpoints.source import ModelSource as Model
from kvlatent.checkpoints.source import resolve_model

__all__ = ["Model", "check_context", "check_numbers", "context_limit", "loaded"]


def check_numbers(
    batches: Sequence[int], contexts: Sequence[int] | None, new_tokens: int | None, repeats: int | None
) -> None:
    """Raise `ValueError` for sizes that make no sense whatever the model."""
    for name, values in (("batches", batches), ("contexts", (1,) if contexts is None else contexts)):
        if not values or min(values) < 1:
            raise ValueError(
                f"{name} are numbers of 1 or more, at least one: got {', '.join(map(str, values)) or 'none'}; try 1"
            )
        if len(set(values)) < len(values):
            raise ValueError(
                f"{name} are measured once each: got {', '.join(map(str, values))}; name each once"
            )
    if new_tokens is not None and new_tokens < 1:
        raise ValueError(f"decoding adds 1 token or more: got new_tokens={new_tokens}; try 16")
    if repeats is not None and repeats < 3:
        raise ValueError(f"a median with quartiles needs 3 rounds or more: got repeats={repeats}; try 5")


def loaded(
    model: Model, original: Model | None, dtype: str | None, device: str
) -> dict[str, PreTrainedModel]:
    """Models by role, the original first, known to belong together."""
    given = {"original": original, "latent": model} if original is not None else {"latent": model}
    models = {role: resolve_model(each, dtype, device) for role, each in given.items() if each is not None}
    if original is None:
        only = models["latent"]
        return models if getattr(only.config, "kv_latent", None) else {"original": only}
    for name, what in (("vocab_size", "tokens"), ("dtype", "dtype"), ("device", "device")):
        values = [getattr(each.config if name == "vocab_size" else each, name) for each in models.values()]
        if values[0] != values[1]:
            raise ValueError(
                f"original and latent model are compared on the same {what}: got {name} {values[0]} and {values[1]}; "
                f"{_ADVICE[name]}"
            )
    return models


_ADVICE = {
    "vocab_size": "compare with the model it came from",
    "dtype": "load both with the same dtype",
    "device": "load both on the same device",
}


def context_limit(models: dict[str, PreTrainedModel]) -> int | None:
    """The shortest context of the models; None where their configs name none."""
    limits = [getattr(each.config, "max_position_embeddings", None) for each in models.values()]
    return min((limit for limit in limits if limit is not None), default=None)


def check_context(contexts: Sequence[int], new_tokens: int, limit: int | None) -> None:
    """Raise `ValueError` unless the longest prompt leaves room for the added tokens."""
    if limit is not None and max(contexts) + new_tokens > limit:
        raise ValueError(
            f"prompt and added tokens must fit the model's context of {limit} tokens: got {max(contexts)} + "
            f"{new_tokens}; give contexts of {max(limit - new_tokens, 1)} or less, or fewer new tokens"
        )
