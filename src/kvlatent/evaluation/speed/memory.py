"""Bytes in memory, read off tensors and counters: of a transformers cache of any kind, of weights, and of a run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEAK_METHODS", "held_bytes", "memory_rise", "read_bytes", "token_bytes", "weight_bytes"]

# Where upstream's cache layers keep keys and values, plain and quantised.
_STORES = ("keys", "values", "_quantized_keys", "_quantized_values")

PEAK_METHODS = {
    "cuda": "weights of this model, and the rise of torch.cuda.max_memory_allocated during one run",
    "cpu": "weights of this model, and the rise of the process's peak resident memory (VmHWM) during one run",
    "none": "not measured: neither a CUDA device nor a Linux that lets a process reset its peak resident memory",
}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors in which a cache keeps keys and values: packed numbers, scales and shifts included."""
    return sum(sum(_sizes(_stored(layer))) for layer in cache.layers)


def token_bytes(cache: Any, batch: int, tokens: int) -> tuple[float, ...]:
    """Bytes that one token of one sequence holds in each layer.

    Args:
        cache: after a prompt; a layer that keeps fewer tokens (a window) or has room for more is divided by those.
        batch, tokens: of the prompt.
    """
    rates = []
    for layer in cache.layers:
        plain = getattr(layer, "_quantized_keys", None) is None
        kept = layer.keys.shape[-2] if plain else tokens
        rates.append(sum(_sizes(_stored(layer))) / (batch * kept))
    return tuple(rates)


def _stored(layer: Any) -> list[Any]:
    return [getattr(layer, name, None) for name in _STORES]


def _sizes(value: Any) -> Iterator[int]:
    """Bytes of every plain tensor inside a value; a packed tensor's are those of the tensors it wraps."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from _sizes([getattr(value, name) for name in names])
        else:
            yield value.numel() * value.element_size()
    elif isinstance(value, dict):
        yield from _sizes(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _sizes(part)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; one that is used twice counts once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def read_bytes(model: Any) -> int:
    """Bytes of the weights that one decoding step reads: all but input embeddings that are not the head as well."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    return weight_bytes(model) - (0 if tied else embeddings.numel() * embeddings.element_size())


def memory_rise(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str]:
    """Bytes by which memory rose at its highest while `call` ran, and which of `PEAK_METHODS` says so.

    On a CPU it is the kernel's count of resident memory, good to some hundred kB. What libraries keep from earlier
    calls is not counted again, so call once before.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "cuda"
    before = _reset_peak()
    call()
    return (None, "none") if before is None else (max(0, _resident("VmHWM") - before), "cpu")


def _reset_peak() -> int | None:
    """Give freed memory back, lower the peak to what is resident now, and return that; None where that is impossible."""
    # Without glibc, freed memory may stay resident and the rise is a lower bound.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(field: str) -> int:
    """A memory figure of this process, bytes, from the kernel."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not report {field}")
