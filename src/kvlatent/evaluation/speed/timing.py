"""Times of a prompt and of the tokens after it, of several models by turns, as medians with quartiles.

A machine's speed drifts while it is measured. Therefore what is compared runs in one process by turns, every second
round in reverse order (A B, B A, A B, ...), and a ratio is taken inside each round before the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvlatent.evaluation.speed.memory import held_bytes, token_bytes

__all__ = ["Run", "Spread", "interleaved", "ratios", "run", "spread"]

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One prompt read and some tokens added.

    Args:
        prefill: seconds to read the prompt, up to the logits of its last token.
        decode: seconds for all added tokens together.
        cache_bytes: held in the cache after the prompt.
        last_cache_bytes: held in it at the end.
        token_bytes: of each layer, bytes that a token of one sequence holds after the prompt.
    """

    prefill: float
    decode: float
    cache_bytes: int
    last_cache_bytes: int
    token_bytes: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# Not inference_mode: tables that latent attention builds at its first forward must stay usable in training.
@torch.no_grad()
def run(
    model: Any, prompt: Tensor, cache: Any, new_tokens: int, *, decode: Callable[..., Any] | None = None
) -> Run:
    """Read `prompt` and add tokens greedily, one forward pass each; neither sampling nor text is in the times.

    Args:
        model: a causal language model in evaluation mode.
        prompt: token ids [B, T] on the model's device.
        cache: an empty transformers cache, which is filled.
        new_tokens: forward passes after the prompt.
        decode: called for these instead of `model`, e.g. its compiled form.
    """
    step, device = model if decode is None else decode, prompt.device
    start = now(device)
    token = _next(model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1))
    prefill = now(device) - start
    held, rates = held_bytes(cache), token_bytes(cache, *prompt.shape)
    start = now(device)
    for _ in range(new_tokens):
        token = _next(step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1))
    seconds = now(device) - start
    return Run(prefill, seconds, held, held_bytes(cache), rates)


def _next(output: Any) -> Tensor:
    return output.logits[:, -1:].argmax(-1)


def interleaved(measures: Mapping[Key, Callable[[], Result]], repeats: int) -> dict[Key, list[Result]]:
    """Results of every measure, `repeats` of each: by turns, in order and then in reverse order."""
    results: dict[Key, list[Result]] = {key: [] for key in measures}
    for repeat in range(repeats):
        for key in reversed(list(measures)) if repeat % 2 else list(measures):
            results[key].append(measures[key]())
    return results


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of two values or more, interpolated between them."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios, each of one round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])
