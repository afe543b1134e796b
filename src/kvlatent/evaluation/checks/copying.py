"""Copying: a random string, text, the first tokens of the string again; can the model read the rest from its cache?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvlatent.evaluation.sequences import ordinary_ids
from kvlatent.text.standard_library import stdlib_documents

__all__ = ["copy_accuracy", "copy_trials", "perplexity", "windowed_mask"]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


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


def _logits(model: Any, rows: torch.Tensor, window: int | None, keep: int) -> torch.Tensor:
    """Logits of the last ``keep`` positions, ``(batch, keep, vocabulary)``; keep 0 means all."""
    extra: dict[str, Any] = {"use_cache": False, "logits_to_keep": keep}
    if window is not None:
        extra["attention_mask"] = windowed_mask(rows.shape[1], window, model.dtype, rows.device)
    return model(input_ids=rows, **extra).logits[:, -keep:]


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
        documents = _encode(tokenizer, stdlib_documents("held_out"))
        filler = np.array([token for document in documents for token in document], dtype=np.int64)
    limit = getattr(model.config, "max_position_embeddings", None)
    ids, device, training = ordinary_ids(tokenizer, model.config.vocab_size), model.device, model.training
    result: dict[int, float] = {}
    model.eval()
    try:
        for distance in distances:
            rows = torch.from_numpy(copy_trials(ids, filler, distance, trials, seed))
            if limit is not None and rows.shape[1] > limit:
                raise ValueError(
                    f"distance {distance} needs {rows.shape[1]} positions, the model has {limit}"
                )
            correct = 0
            for batch in rows.split(batch_size):
                with torch.inference_mode():
                    best = _logits(model, batch[:, :-1].to(device), window, 14).argmax(-1).cpu()
                correct += int((best == batch[:, -14:]).sum())
            result[distance] = correct / (14 * trials)
    finally:
        model.train(training)
    return result


def perplexity(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str] | None = None,
    context: int = 1024,
    window: int | None = None,
    batch_size: int = 8,
) -> float:
    """Token-weighted perplexity on ``documents`` (default: the held-out modules, without tests).

    Each document, led by the end-of-text token, is cut into windows of at most ``context`` tokens that are
    scored independently; the first token of a window is context only. ``window`` as in
    :func:`copy_accuracy`. Raises ``ValueError`` when there is nothing to score.
    """
    lead = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = _encode(tokenizer, stdlib_documents("held_out") if documents is None else documents)
    streams = [lead + ids for ids in encoded]
    rows = [stream[at : at + context] for stream in streams for at in range(0, len(stream) - 1, context)]
    rows.sort(key=len, reverse=True)
    if not rows:
        raise ValueError("no text to score: this Python ships none of the held-out modules")
    total, count, training = 0.0, 0, model.training
    model.eval()
    try:
        while rows:
            group = [row for row in rows[:batch_size] if len(row) == len(rows[0])]
            rows = rows[len(group) :]
            batch = torch.tensor(group, device=model.device)
            with torch.inference_mode():
                logits = _logits(model, batch, window, 0)[:, :-1].flatten(0, 1).float()
                target = batch[:, 1:].flatten()
                total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            count += target.numel()
    finally:
        model.train(training)
    return math.exp(total / count)
