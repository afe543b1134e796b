"""Copying: a random string, text, the first tokens of the string again; can the model read the rest from its cache?"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvlatent.evaluation.sequences import evaluation_mode, ordinary_ids
from kvlatent.text.standard_library import stdlib_documents

__all__ = ["copy_accuracy", "copy_trials", "window_hiding", "windowed_mask"]


def copy_trials(
    ids: np.ndarray,
    filler: np.ndarray,
    distance: int,
    trials: int,
    seed: int = 0,
    prefix: int = 64,
    length: int = 16,
) -> np.ndarray:
    """Sequences that end with the second occurrence of a random string.

    Each row is ``prefix`` tokens of ``filler``, ``length`` tokens drawn uniformly from ``ids``, filler up
    to ``distance`` tokens after the string's start, and the string again. ``filler`` is one long token
    stream (1-D); every row reads it from random places. Returns int64 of shape
    ``(trials, prefix + distance + length)``, the same for the same seed and distance.

    Raises ``ValueError`` when the occurrences would overlap or ``filler`` is too short.
    """
    if distance < length:
        raise ValueError(f"distance {distance} is shorter than the string ({length} tokens)")
    gap = distance - length
    if len(filler) <= max(prefix, gap):
        raise ValueError(f"filler has {len(filler)} tokens, more than {max(prefix, gap)} are needed")
    rng = np.random.default_rng([seed, distance])
    rows = np.empty((trials, prefix + distance + length), dtype=np.int64)
    for row in rows:
        string = rng.choice(ids, size=length)
        before, between = rng.integers(0, len(filler) - prefix), rng.integers(0, len(filler) - gap)
        row[:prefix] = filler[before : before + prefix]
        row[prefix : prefix + length] = string
        row[prefix + length : prefix + distance] = filler[between : between + gap]
        row[prefix + distance :] = string
    return rows


def windowed_mask(length: int, window: int | None, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
    """Additive causal mask of shape ``(1, 1, length, length)``: query i sees the keys i - window .. i.

    ``window=None`` hides only the future. Visible entries are 0, hidden ones the most negative ``dtype``.
    """
    position = torch.arange(length, device=device)
    back = position[:, None] - position[None, :]
    hidden = (back < 0) if window is None else (back < 0) | (back > window)
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


@contextmanager
def window_hiding(model: Any, window: int | None) -> Generator[None]:
    """`model` sees no key more than `window` tokens back, in every layer (attention ``eager`` or ``sdpa``); None: all.

    Sequences are read from their first token on, without a cache.
    """

    def add_mask(
        _: Any, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = given["input_ids"]
        return args, given | {"attention_mask": windowed_mask(ids.shape[1], window, model.dtype, ids.device)}

    if window is None:
        yield
        return
    hook = model.get_decoder().register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def copy_accuracy(
    model: Any,
    tokenizer: Any,
    distances: Sequence[int] = (50, 200, 400, 700),
    trials: int = 500,
    seed: int = 0,
    window: int | None = None,
    batch_size: int = 25,
    filler: np.ndarray | None = None,
) -> dict[int, float]:
    """Share of random-string tokens that the model repeats correctly, by distance in tokens.

    For each distance, ``trials`` sequences of :func:`copy_trials` (16-token strings in held-out code) are
    read with teacher forcing, and the argmax at positions 3 to 16 of the second occurrence is compared
    with the string: ``14 * trials`` predictions a distance, as a fraction from 0 to 1. ``window`` hides all
    keys more than that many tokens back, in every layer (attention ``eager`` or ``sdpa``). ``model`` is any
    Hugging Face causal LM; its mode (train or eval) is put back afterwards. ``filler`` replaces the
    held-out token stream.

    Raises ``ValueError`` when there is no held-out text to fill with, or a sequence exceeds the context.
    """
    if filler is None:
        documents = stdlib_documents("held_out")
        streams = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        filler = np.array([token for stream in streams for token in stream], dtype=np.int64)
    limit = getattr(model.config, "max_position_embeddings", None)
    ids = ordinary_ids(tokenizer, model.config.vocab_size)
    result: dict[int, float] = {}
    with window_hiding(model, window), evaluation_mode(model):
        for distance in distances:
            rows = torch.from_numpy(copy_trials(ids, filler, distance, trials, seed))
            if limit is not None and rows.shape[1] > limit:
                raise ValueError(
                    f"distance {distance} needs {rows.shape[1]} positions, the model has {limit}"
                )
            correct = 0
            for batch in rows.split(batch_size):
                output = model(input_ids=batch[:, :-1].to(model.device), use_cache=False, logits_to_keep=14)
                correct += int((output.logits[:, -14:].argmax(-1).cpu() == batch[:, -14:]).sum())
            result[distance] = correct / (14 * trials)
    return result
