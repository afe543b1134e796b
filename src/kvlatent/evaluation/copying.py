"""Copying: a random string, text, the first tokens of the string again; can the model read the rest from its cache?"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvlatent.evaluation.sequences import at_the_ends, context_limit, leading_ids, ordinary_ids
from kvlatent.text.standard_library import stdlib_documents

__all__ = [
    "COUNTED",
    "PREFIX",
    "STRING",
    "copied_tokens",
    "copy_accuracy",
    "copy_trials",
    "window_hiding",
    "windowed_mask",
]

PREFIX, STRING = 64, 16
"""Tokens before the string, and of the string."""

COUNTED = STRING - 2
"""Tokens of the string that have to be repeated; the first two are the cue."""


def copy_trials(
    ids: np.ndarray,
    filler: np.ndarray,
    distance: int,
    trials: int,
    seed: int = 0,
    prefix: int = PREFIX,
    length: int = STRING,
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
    read by :func:`copied_tokens`: ``14 * trials`` predictions a distance, as a fraction from 0 to 1. ``window``
    hides all keys more than that many tokens back, in every layer (attention ``eager`` or ``sdpa``). ``model`` is
    any Hugging Face causal LM; its mode (train or eval) is put back afterwards. ``filler`` replaces the
    held-out token stream.

    Raises ``ValueError`` when there is no held-out text to fill with, a sequence exceeds the context, or a logit is
    not finite.
    """
    if filler is None:
        documents = stdlib_documents("held_out")
        streams = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        filler = np.array([token for stream in streams for token in stream], dtype=np.int64)
    with window_hiding(model, window):
        hits = copied_tokens(model, tokenizer, filler, distances, trials, seed=seed, batch_size=batch_size)
    return {distance: float(counts.sum()) / (COUNTED * trials) for distance, counts in hits.items()}


def copied_tokens(
    model: Any,
    tokenizer: Any,
    filler: np.ndarray,
    distances: Sequence[int],
    trials: int,
    *,
    seed: int = 0,
    batch_size: int = 25,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[int, np.ndarray]:
    """How many of the 14 last tokens of its string the model repeats in each trial, float [trials] by distance.

    Sequences of :func:`copy_trials` are read with teacher forcing, after the token that the tokenizer puts before a
    text, and the argmax at positions 3 to 16 of the second occurrence is compared with the string. ``advance`` is
    called with the sequences of each batch, when it is done.

    Raises ``ValueError`` when a sequence exceeds the context, the filler is too short, or a logit is not finite.
    """
    limit, lead = context_limit(model.config), leading_ids(tokenizer)
    ids = ordinary_ids(tokenizer, model.config.vocab_size)
    result: dict[int, np.ndarray] = {}
    for distance in distances:
        rows = copy_trials(ids, filler, distance, trials, seed)
        rows[:, : len(lead)] = lead
        if limit is not None and rows.shape[1] > limit:
            raise ValueError(f"distance {distance} needs {rows.shape[1]} positions, the model has {limit}")
        result[distance] = at_the_ends(
            model, rows, COUNTED, _count_hits, batch_size=batch_size, advance=advance
        )
    return result


def _count_hits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many tokens are the likeliest, [B], of logits [B, keep, V] and tokens [B, keep]."""
    return (logits.argmax(-1) == target).sum(-1)
