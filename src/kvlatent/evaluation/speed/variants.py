"""One cell of a bench, a batch and a context: every model with every cache, warmed up, weighed, and timed by turns.

A machine's speed drifts while it is measured. Therefore what is compared runs in one process by turns, every second
round in reverse order (A B, B A, A B, ...), and a ratio is taken inside each round before the median.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.engines.cpu_decode import IMPLEMENTATION
from kvlatent.evaluation.speed.caches import make_cache
from kvlatent.evaluation.speed.memory import held_bytes, memory_rise, token_bytes, weight_bytes

__all__ = [
    "ATTENTIONS",
    "MeasuredCell",
    "Run",
    "Variant",
    "attention_of",
    "interleaved",
    "measure_cell",
    "random_prompt",
    "run",
]

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", IMPLEMENTATION)
UNTIMED = 2
"""Runs before the timed ones: a warm-up, and one whose memory is measured."""


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
class MeasuredCell:
    """What a cell found of one model with one cache.

    Args:
        role: "original" or "latent".
        cache: a key of `CACHES`.
        batch, context: sequences, and tokens of each prompt.
        runs: timed ones, in order; two variants' runs of one index are neighbours in time.
        peak_bytes: weights and the highest rise of memory during a run; None where it cannot be measured.
        peak_method: a key of `memory.PEAK_METHODS`.
    """

    role: str
    cache: str
    batch: int
    context: int
    runs: tuple[Run, ...]
    peak_bytes: int | None
    peak_method: str


@dataclass
class Variant:
    """A model with a kind of cache, ready to run.

    Args:
        role, cache: as in `MeasuredCell`.
        model: in evaluation mode.
        compiled: compile the decoding step.
    """

    role: str
    cache: str
    model: Any
    compiled: bool = False
    _step: Callable[..., Any] | None = field(default=None, init=False)
    _reused: Any = field(default=None, init=False)

    def start_cell(self) -> None:
        """Forget the compiled step and the cache of the last cell."""
        self._step = self._reused = None

    def run(self, prompt: Tensor, new_tokens: int) -> Run:
        """Read a prompt and add tokens, with an empty cache."""
        if self.compiled and self._step is None:
            self._step = self._compile(prompt.device)
        cache = self._empty_cache(prompt.shape[1] + new_tokens)
        return run(self.model, prompt, cache, new_tokens, decode=self._step)

    def held(self) -> int:
        """Bytes of a cache that stays between runs."""
        return 0 if self._reused is None else held_bytes(self._reused)

    def _compile(self, device: torch.device) -> Callable[..., Any]:
        """The compiled step, with a number of recompilations of its own.

        With a static cache on a GPU, CUDA graphs are replayed as in upstream's `generate`.
        """
        static = self.cache == "static"
        mode = "reduce-overhead" if static and device.type == "cuda" else "default"
        dynamic = False if static else None
        compiler: Any = torch.compile  # its overloads leave an option out
        return compiler(self.model, mode=mode, dynamic=dynamic, isolate_recompiles=True)

    def _empty_cache(self, length: int) -> Any:
        if self._reused is not None:
            self._reused.reset()
            return self._reused
        cache = make_cache(self.cache, self.model.config, length)
        if self.compiled and self.cache == "static":
            self._reused = cache  # the compiled step is bound to its tensors' addresses
        return cache


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


def random_prompt(vocabulary: int, batch: int, context: int, seed: int, device: torch.device) -> Tensor:
    """Token ids [B, T], uniform over the vocabulary, the same for the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, context), generator=generator).to(device)


def measure_cell(
    variants: Sequence[Variant],
    prompt: Tensor,
    new_tokens: int,
    repeats: int,
    progress: Callable[[], None],
) -> tuple[list[MeasuredCell], list[Variant]]:
    """Measure variants on one prompt, and name those that ran out of the GPU's memory.

    Args:
        variants: what is compared, in order.
        prompt: token ids [B, T].
        new_tokens, repeats: as in `bench`.
        progress: called after each run.
    """
    if any(variant.compiled for variant in variants):
        torch.compiler.reset()  # shapes of earlier cells would use up the number of recompilations
    fits, peaks, too_large = [], [], []
    for variant in variants:
        variant.start_cell()
        peak = _weigh(variant, prompt, new_tokens, progress)
        if peak is None:
            too_large.append(variant)
            variant.start_cell()
            torch.cuda.empty_cache()
        else:
            fits.append(variant)
            peaks.append(peak)

    def timed(variant: Variant) -> Run:
        result = variant.run(prompt, new_tokens)
        progress()
        return result

    runs = interleaved({index: partial(timed, variant) for index, variant in enumerate(fits)}, repeats)
    batch, context = prompt.shape
    measured = [
        MeasuredCell(variant.role, variant.cache, batch, context, tuple(runs[index]), *peaks[index])
        for index, variant in enumerate(fits)
    ]
    for variant in fits:
        variant.start_cell()
    return measured, too_large


def _weigh(
    variant: Variant, prompt: Tensor, new_tokens: int, progress: Callable[[], None]
) -> tuple[int | None, str] | None:
    """Peak memory of the second run, and how it was found; None where the GPU's memory does not suffice."""
    try:
        variant.run(prompt, new_tokens)
        progress()
        kept = variant.held()  # allocated by the first run already
        rise, method = memory_rise(lambda: variant.run(prompt, new_tokens), prompt.device)
        progress()
    except torch.OutOfMemoryError:
        return None
    return (None if rise is None else weight_bytes(variant.model) + kept + rise), method


@contextlib.contextmanager
def attention_of(models: Sequence[PreTrainedModel], name: str | None) -> Generator[None]:
    """Run models in evaluation mode with this attention; afterwards all is as before.

    Raises:
        ValueError: an attention that is not known, or that transformers cannot run here.
    """
    if name is not None and name not in ATTENTIONS:
        near = get_close_matches(name.lower(), ATTENTIONS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown attention {name!r}; {hint}choose one of {', '.join(ATTENTIONS)}")
    before: list[Any] = [(model, model.training, model.config._attn_implementation) for model in models]
    try:
        for model in models:
            model.eval()
            if name is not None:
                _set_attention(model, name)
        yield
    finally:
        for model, training, implementation in before:
            model.set_attn_implementation(implementation)
            model.train(training)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"attention {name} does not work here: {reason}; try sdpa") from error
