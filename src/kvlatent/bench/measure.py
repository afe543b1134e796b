"""How fast a model reads and writes, and what its cache takes, beside its original: measured, with the bound by bytes.

Every combination of model and cache runs by turns in one process (see `timing`), on the same random prompts. Times are
of forward passes alone. The rival of narrower heads is a quantised cache; both are measured alone and on each other.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cost import maximum_context
from ..record import environment
from ..sources import named
from .caches import CACHES, PACKAGES, cached_widths, check_caches, group_size
from .cells import UNTIMED, Measured, Variant, attention_of, measure_cell, random_prompt
from .door import Model, check_numbers, contexts_for, loaded
from .figures import largest_contexts, ratio_rows, stacked_rows, table_rows
from .memory import PEAK_METHODS, read_bytes, weight_bytes

__all__ = ["bench"]

Progress = Callable[[str, int, int, str], None]


def bench(
    model: Model,
    original: Model | None = None,
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] | None = None,
    new_tokens: int = 16,
    repeats: int = 5,
    caches: Sequence[str] = ("dynamic", "quantized-int4"),
    memory: float | None = None,
    attention: str | None = None,
    compile: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, and the original it came from when that is given.

    Args:
        model, original: a directory, a hub id or a loaded model.
        batches: sequences at once.
        contexts: prompt lengths, tokens; None takes `door.CONTEXTS` as far as the model's context allows.
        new_tokens: tokens that are added to a prompt.
        repeats: rounds that are timed; two more, untimed, warm up and measure memory.
        caches: keys of `caches.CACHES`.
        memory: bytes to find the longest contexts for; None takes the GPU's, and none on a CPU.
        attention: "eager", "sdpa", "flex_attention" or "flash_attention_2"; None leaves the models as they are.
        compile: compile the step that adds a token (the prompt is always read uncompiled, as in upstream's `generate`).
        dtype: "float32", "bfloat16", "float16" or None, what the checkpoint has; ignored for loaded models.
        device: to load on; loaded models stay where they are.
        seed: of the random prompts.
        progress: called with what is done, runs done, their number, and a note.

    Returns:
        A JSON-able dict {"kind": "bench", "model", "original", "device", "dtype", "attention", "compile", "peak_memory"
        (how it is measured), "rows", "ratios", "stacked", "largest_context", "skipped", "settings", "record"}; see
        `figures` for the rows. "skipped" lists what ran out of the GPU's memory.

    Raises:
        ValueError: sizes that make no sense or exceed the models' context, models that do not belong together, an
            unknown attention or cache, a missing package, or a memory below the model's weights.
    """
    start = time.perf_counter()
    check_numbers(batches, contexts, new_tokens, repeats)
    models = loaded(model, original, dtype, device)
    latent = list(models.values())[-1]
    lengths = contexts_for(contexts, new_tokens, models)
    if memory is None and latent.device.type == "cuda":
        memory = torch.cuda.get_device_properties(latent.device).total_memory
    if memory is not None:
        maximum_context(memory, weight_bytes(latent), (1.0,))  # refuses a memory below the weights
    check_caches(caches, [each.config for each in models.values()], latent.device, compiled=compile)
    variants = [Variant(role, cache, each, compile) for cache in caches for role, each in models.items()]
    with attention_of(list(models.values()), attention):
        implementation = latent.config._attn_implementation
        cells, skipped = _measured(variants, batches, lengths, new_tokens, repeats, seed, progress)
    methods = sorted({cell.peak_method for cell in cells})
    sources = {"original": original, "latent": model}
    about = {role: _about(each, sources[role] or model, caches) for role, each in models.items()}
    return {
        "kind": "bench",
        "model": about.get("latent") or about["original"],
        "original": about["original"] if original is not None else None,
        "device": str(latent.device.type),
        "dtype": str(latent.dtype).removeprefix("torch."),
        "attention": implementation,
        "compile": compile,
        "peak_memory": "; ".join(PEAK_METHODS[method] for method in methods),
        "rows": table_rows(cells, new_tokens),
        "ratios": ratio_rows(cells, models),
        "stacked": stacked_rows(cells, models),
        "largest_context": None
        if memory is None
        else {"memory_bytes": int(memory), "rows": largest_contexts(cells, models, memory)},
        "skipped": skipped,
        "settings": {
            "batches": list(batches),
            "contexts": lengths,
            "caches": list(caches),
            "new_tokens": new_tokens,
            "repeats": repeats,
        },
        "record": _record(latent, caches) | {"seed": seed, "seconds": round(time.perf_counter() - start, 3)},
    }


def _measured(
    variants: Sequence[Variant],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    seed: int,
    progress: Progress | None,
) -> tuple[list[Measured], list[dict[str, Any]]]:
    """All cells, and what ran out of memory."""
    cells: list[Measured] = []
    skipped: list[dict[str, Any]] = []
    grid = list(itertools.product(batches, contexts))
    runs = len(variants) * (repeats + UNTIMED)
    config, device = variants[0].model.config, variants[0].model.device
    for number, (batch, context) in enumerate(grid):
        done = itertools.count(number * runs + 1)

        def tick(done: Iterator[int] = done, note: str = f"batch {batch}, context {context}") -> None:
            if progress is not None:
                progress("measure", next(done), len(grid) * runs, note)

        prompt = random_prompt(config.vocab_size, batch, context, seed, device)
        measured, too_large = measure_cell(variants, prompt, new_tokens, repeats, tick)
        cells += measured
        for each in too_large:
            where = {"batch": batch, "context": context, "model": each.role, "cache": each.cache}
            skipped.append(where | {"reason": "out of memory"})
    return cells, skipped


def _about(model: Any, source: Model, caches: Sequence[str]) -> dict[str, Any]:
    """Which model it is, its bytes and widths, and the group sizes of its quantised caches."""
    keys, values = zip(*cached_widths(model.config), strict=True)
    sizes = {cache: group_size(cache, model.config) for cache in caches}
    return {
        **named(model, source),
        "weight_bytes": weight_bytes(model),
        "read_bytes": read_bytes(model),
        "d_qk": list(keys),
        "d_vo": list(values),
        "group_sizes": {cache: size for cache, size in sizes.items() if size is not None},
    }


def _record(model: PreTrainedModel, caches: Sequence[str]) -> dict[str, Any]:
    """Versions and machine, the packages behind the quantised caches included."""
    record = environment(model.device.type)
    for package in sorted(
        {PACKAGES[kind[0]] for kind in map(CACHES.get, caches) if kind and kind[0] in PACKAGES}
    ):
        record["versions"] |= {package: importlib.metadata.version(package)}
    return record
