"""How fast a model reads and writes, and what its cache takes, beside its original: measured, with the bound by bytes.

Every combination of model and cache runs by turns in one process (see `variants`), on the same random prompts. Times are
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

from kvlatent.checkpoints.source import ModelSource, name_and_fingerprint, resolve_model
from kvlatent.engines.roofline import maximum_context
from kvlatent.evaluation.result_models import Bench
from kvlatent.evaluation.sequences import shortest_context
from kvlatent.evaluation.speed.bench_extent import NEW_TOKENS, BenchExtent, extent_of
from kvlatent.evaluation.speed.caches import CACHES, PACKAGES, cached_widths, group_size, working_caches
from kvlatent.evaluation.speed.memory import PEAK_METHODS, read_bytes, weight_bytes
from kvlatent.evaluation.speed.ratios import cell_rows, largest_contexts, ratio_rows, stacked_rows
from kvlatent.evaluation.speed.variants import (
    UNTIMED,
    MeasuredCell,
    Variant,
    attention_of,
    measure_cell,
    random_prompt,
)
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import environment
from kvlatent.model.time_estimate import DEFAULT_SECONDS

__all__ = ["bench", "check_context", "check_numbers"]


def bench(
    model: ModelSource,
    original: ModelSource | None = None,
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] | None = None,
    new_tokens: int | None = None,
    repeats: int | None = None,
    caches: Sequence[str] | None = None,
    memory: float | None = None,
    attention: str | None = None,
    compile: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | Report | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, and the original it came from when that is given.

    Without contexts, as much is measured as two minutes on two cores hold, by the models' size (see `extent`).

    Args:
        model, original: a directory, a hub id, a GGUF file or a loaded model.
        batches: sequences at once.
        contexts: prompt lengths, tokens; None takes 256, 1024 and 4096 as far as the models' context and size allow.
        new_tokens: tokens that are added to a prompt; None takes 16, without contexts fewer of a large model.
        repeats: rounds that are timed; two more, untimed, warm up and measure memory. None takes 5, or likewise fewer.
        caches: keys of `caches.CACHES`; None takes dynamic and quantized-int4, the latter where it works.
        memory: bytes to find the longest contexts for; None takes the GPU's, and none on a CPU.
        attention: "eager", "sdpa", "flex_attention" or "flash_attention_2"; None leaves the models as they are.
        compile: compile the step that adds a token (the prompt is always read uncompiled, as in upstream's `generate`).
        dtype: "float32", "bfloat16", "float16" or None, what the checkpoint has; ignored for loaded models.
        device: to load on; loaded models stay where they are.
        seed: of the random prompts.
        progress: called with a step's name, the tokens of runs done, of all runs, and a note.
        say: called with a sentence where less is measured than of a small model, or a default cache does not work.

    Returns:
        A JSON-able dict {"kind": "bench", "model", "original", "device", "dtype", "attention", "compile", "peak_memory"
        (how it is measured), "rows", "ratios", "stacked", "largest_context", "skipped", "settings", "record"}; see
        `figures` for the rows. "skipped" lists what ran out of the GPU's memory.

    Raises:
        ValueError: sizes that make no sense or exceed the models' context, models that do not belong together, an
            unknown attention or cache, a missing package, or a memory below the model's weights.
    """
    start, told = time.perf_counter(), Progress.of(progress)
    check_numbers(batches, contexts, new_tokens, repeats)
    told.report("load")
    models = _load_models(model, original, dtype, device)
    latent = list(models.values())[-1]
    if memory is None and latent.device.type == "cuda":
        memory = torch.cuda.get_device_properties(latent.device).total_memory
    if memory is not None:
        maximum_context(memory, weight_bytes(latent), (1.0,))  # refuses a memory below the weights
    sizes = {"contexts": contexts, "new_tokens": new_tokens, "repeats": repeats}
    caches, extent, about_extent = _chosen(models, caches, batches, sizes, compile, say)
    variants = [Variant(role, cache, each, compile) for cache in caches for role, each in models.items()]
    with attention_of(list(models.values()), attention):
        implementation = latent.config._attn_implementation
        cells, skipped = _measured(variants, batches, extent, seed, told)
    methods = sorted({cell.peak_method for cell in cells})
    read = {role: read_bytes(each) for role, each in models.items()}
    sources = {"original": original, "latent": model}
    about = {role: _about(each, sources[role] or model, caches) for role, each in models.items()}
    document = {
        "kind": "bench",
        "model": about.get("latent") or about["original"],
        "original": about["original"] if original is not None else None,
        "device": str(latent.device.type),
        "dtype": str(latent.dtype).removeprefix("torch."),
        "attention": implementation,
        "compile": compile,
        "peak_memory": "; ".join(PEAK_METHODS[method] for method in methods),
        "rows": cell_rows(cells, extent.new_tokens),
        "ratios": ratio_rows(cells, read),
        "stacked": stacked_rows(cells, read),
        "largest_context": None
        if memory is None
        else {"memory_bytes": int(memory), "rows": largest_contexts(cells, models, memory)},
        "skipped": skipped,
        "settings": {
            "batches": list(batches),
            "contexts": list(extent.contexts),
            "caches": caches,
            "new_tokens": extent.new_tokens,
            "repeats": extent.repeats,
        },
        "record": _record(latent, caches)
        | {"seed": seed, "extent": about_extent, "seconds": round(time.perf_counter() - start, 3)},
    }
    return Bench.checked(document)


def _chosen(
    models: dict[str, PreTrainedModel],
    caches: Sequence[str] | None,
    batches: Sequence[int],
    sizes: dict[str, Any],
    compiled: bool,
    say: Callable[[str], None] | None,
) -> tuple[list[str], BenchExtent, dict[str, Any]]:
    """Caches and extent, given or by default, known to be possible; and what the record says of them."""
    each, device, limit = (
        list(models.values()),
        next(iter(models.values())).device,
        shortest_context(models.values()),
    )
    if sizes["contexts"] is not None:  # first, as trying a cache can build its code
        check_context(sizes["contexts"], sizes["new_tokens"] or NEW_TOKENS, limit)
    kinds, left_out = working_caches(caches, each, device, compiled=compiled)
    extent = extent_of(each, kinds, batches, limit=limit, **sizes)
    check_context(extent.contexts, extent.new_tokens, limit)
    sentences = [f"a default cache is left out: {reason}" for reason in left_out]
    sentences += [extent.sentence] if extent.sentence is not None else []
    if say is not None:
        for sentence in sentences:
            say(sentence)
    about = {
        "estimated_seconds": round(extent.seconds, 1),
        "default_seconds": DEFAULT_SECONDS,
        "sentences": sentences,
    }
    return kinds, extent, about


def _measured(
    variants: Sequence[Variant],
    batches: Sequence[int],
    extent: BenchExtent,
    seed: int,
    progress: Progress,
) -> tuple[list[MeasuredCell], list[dict[str, Any]]]:
    """All cells, and what ran out of memory."""
    cells: list[MeasuredCell] = []
    skipped: list[dict[str, Any]] = []
    grid = list(itertools.product(batches, extent.contexts))
    runs = len(variants) * (extent.repeats + UNTIMED)
    config, device = variants[0].model.config, variants[0].model.device
    tokens = [
        batch * (context + extent.new_tokens) for batch, context in grid
    ]  # of a run: cells differ in time
    for number, (batch, context) in enumerate(grid):
        done = itertools.count(runs * sum(tokens[:number]), tokens[number])

        def tick(done: Iterator[int] = done, note: str = f"batch {batch}, context {context}") -> None:
            progress.report("measure", next(done), runs * sum(tokens), note)

        tick()
        prompt = random_prompt(config.vocab_size, batch, context, seed, device)
        measured, too_large = measure_cell(variants, prompt, extent.new_tokens, extent.repeats, tick)
        cells += measured
        for each in too_large:
            where = {"batch": batch, "context": context, "model": each.role, "cache": each.cache}
            skipped.append(where | {"reason": "out of memory"})
    return cells, skipped


def _about(model: Any, source: ModelSource, caches: Sequence[str]) -> dict[str, Any]:
    """Which model it is, its bytes and widths, and the group sizes of its quantised caches."""
    keys, values = zip(*cached_widths(model.config), strict=True)
    sizes = {cache: group_size(cache, model.config) for cache in caches}
    return {
        **name_and_fingerprint(model, source),
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


def _load_models(
    model: ModelSource, original: ModelSource | None, dtype: str | None, device: str
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


def check_context(contexts: Sequence[int], new_tokens: int, limit: int | None) -> None:
    """Raise `ValueError` unless the longest prompt leaves room for the added tokens."""
    if limit is not None and max(contexts) + new_tokens > limit:
        raise ValueError(
            f"prompt and added tokens must fit the model's context of {limit} tokens: got {max(contexts)} + "
            f"{new_tokens}; give contexts of {max(limit - new_tokens, 1)} or less, or fewer new tokens"
        )
