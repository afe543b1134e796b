"""`bench` on an engine itself: original and latent model with every type of its cache, by turns, at several contexts.

Each pair of model and type is an engine of its own that stays loaded, with room for the longest context. The prompts are
the same random tokens for all, never from a cache of prompts. A ratio is taken inside each round (see `variants`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvlatent.engines.engine_process import EngineProcess, EngineSettings
from kvlatent.engines.stored_weights import stored_weights
from kvlatent.evaluation.result_models import Bench
from kvlatent.evaluation.speed.bench_extent import CONTEXTS, NEW_TOKENS, REPEATS
from kvlatent.evaluation.speed.bench_run import check_context, check_numbers
from kvlatent.evaluation.speed.ratios import cell_rows, ratio_rows, stacked_rows
from kvlatent.evaluation.speed.read_rate import read_rate
from kvlatent.evaluation.speed.variants import MeasuredCell, Run, interleaved, random_prompt
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import environment, name_for_record
from kvlatent.workflows.engine_choice import Runnable, choose_runnable, foresee_runnable, runner_named

__all__ = ["BENCH_ENGINES", "bench_engine"]

BENCH_ENGINES = ("llama.cpp", "openvino", "vllm")


def bench_engine(
    model: str | Path,
    original: str | Path | None = None,
    *,
    engine: str,
    cache: Path,
    contexts: Sequence[int] | None = None,
    new_tokens: int | None = None,
    repeats: int | None = None,
    kv_dtypes: Sequence[str] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | Report | None = None,
) -> dict[str, Any]:
    """Measure a model on an engine, and the original that it came from when that is given.

    Args:
        model, original: what the engine loads, or a checkpoint, which is exported for it (the original at full width).
        engine: one of `BENCH_ENGINES`.
        cache: folder for exports.
        contexts: prompt lengths, tokens; None takes 256, 1024 and 4096 as far as the models' context allows.
        new_tokens: tokens that are added to a prompt; None takes 16.
        repeats: rounds that are timed, after one that is not; None takes 5.
        kv_dtypes: types of the cache, as the engine calls them; None takes its default.
        dtype: of the matrices of exports; None: as stored.
        seed: of the random prompts.
        progress: told of each run.

    Returns:
        A JSON-able document as `bench` gives it. Its caches are types of the engine's, their bytes what the engine reports for a token
        by the tokens of the prompt; "bound_ms_per_token" is the bytes of a step (weights and cache) at the rate at which this
        machine reads memory, "read_bytes_per_s", the better of before and after.

    Raises:
        ValueError, FileNotFoundError: sizes that make no sense or exceed the context, an engine or a type that cannot be
            had, models that do not belong together.
    """
    start, told = time.perf_counter(), Progress.of(progress)
    if engine not in BENCH_ENGINES:
        raise ValueError(f"no bench runs on engine {engine!r}; choose one of {', '.join(BENCH_ENGINES)}")
    check_numbers((1,), contexts, new_tokens, repeats)
    runner_named(engine)
    given = {"original": original, "latent": model} if original is not None else {"latent": model}
    sources = {role: source for role, source in given.items() if source is not None}
    _check_before_exports(sources, engine, contexts, new_tokens, kv_dtypes)
    models = {
        role: choose_runnable(source, engine, cache, dtype=dtype, progress=told)
        for role, source in sources.items()
    }
    limit, added = min(one.context for one in models.values()), new_tokens or NEW_TOKENS
    lengths = list(contexts or sorted({min(length, limit - added - 1) for length in CONTEXTS}))
    check_context(lengths, added + 1, limit)
    types = _types(models, kv_dtypes)
    prompts = {length: _prompt(models, length, seed) for length in lengths}
    threads = EngineSettings("", "", 1).num_threads
    rates = [read_rate(threads)]
    cells, facts = _measured(models, types, prompts, added, repeats or REPEATS, told)
    rates.append(read_rate(threads))
    about = {role: _about(one, sources[role]) for role, one in models.items()}
    record = environment("cpu")
    record["machine"]["engine_threads"] = threads
    record["caches"] = [{"model": role, "cache": label, **said} for (role, label), said in facts.items()]
    return Bench.checked(
        {
            "kind": "bench",
            "engine": next(iter(facts.values()))["engine"],
            "model": about["latent"],
            "original": about.get("original"),
            "device": "cuda" if engine == "vllm" and torch.cuda.is_available() else "cpu",
            "dtype": dtype or "as stored",
            "attention": engine,
            "compile": False,
            "peak_memory": "not measured: the engine is a process of its own",
            **_figures(cells, {role: one["read_bytes"] for role, one in about.items()}, added, max(rates)),
            "settings": {
                "batches": [1],
                "contexts": lengths,
                "caches": list(dict.fromkeys(label for _, label in facts)),
                "new_tokens": added,
                "repeats": repeats or REPEATS,
            },
            "record": record | {"seed": seed, "seconds": round(time.perf_counter() - start, 3)},
        }
    )


def _figures(
    cells: Sequence[MeasuredCell], read: Mapping[str, float], new_tokens: int, rate: float
) -> dict[str, Any]:
    """Rows and ratios, and the bound of a step by the bytes that it reads (weights by role in `read`) at a rate."""
    rows = cell_rows(cells, new_tokens)
    for row in rows:
        row["bound_ms_per_token"] = 1e3 * (read[row["model"]] + row["cache_bytes"]) / rate
    return {
        "read_bytes_per_s": rate,
        "rows": rows,
        "ratios": ratio_rows(cells, read),
        "stacked": stacked_rows(cells, read),
    }


def _check_before_exports(
    sources: Mapping[str, str | Path],
    engine: str,
    contexts: Sequence[int] | None,
    new_tokens: int | None,
    kv_dtypes: Sequence[str] | None,
) -> None:
    """Refuse by the configs of checkpoints what would be refused of their exports."""
    foreseen = {role: foresee_runnable(source, engine) for role, source in sources.items()}
    known = {role: one for role, one in foreseen.items() if one is not None}
    if not known:
        return
    if contexts:
        check_context(contexts, (new_tokens or NEW_TOKENS) + 1, min(one.context for one in known.values()))
    _types(known, kv_dtypes)


def _types(models: Mapping[str, Runnable], kv_dtypes: Sequence[str] | None) -> list[str | None]:
    """Types of the cache, known to be taken by every model; None is the engine's default."""
    if kv_dtypes is None:
        return [None]
    for one in models.values():
        types = [one.check_kv_dtype(name) for name in kv_dtypes]
    if len(set(types)) < len(types):
        raise ValueError(
            f"types of the cache are measured once each: got {', '.join(kv_dtypes)}; name each once"
        )
    return types


def _prompt(models: Mapping[str, Runnable], length: int, seed: int) -> list[int]:
    """Random token ids that all models have."""
    sizes = {role: stored_weights(Path(one.path)).vocabulary for role, one in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"both models must read the same tokens: their vocabularies have {' and '.join(map(str, sizes.values()))} entries; "
            "compare with the model it came from"
        )
    return random_prompt(next(iter(sizes.values())), 1, length, seed, torch.device("cpu"))[0].tolist()


def _measured(
    models: Mapping[str, Runnable],
    types: Sequence[str | None],
    prompts: Mapping[int, list[int]],
    new_tokens: int,
    repeats: int,
    progress: Progress,
) -> tuple[list[MeasuredCell], dict[tuple[str, str], dict[str, Any]]]:
    """Cells, and `EngineFacts` of every engine by model and type of cache; all are started, and run by turns."""
    room = max(prompts) + new_tokens + 1
    with contextlib.ExitStack() as stack:
        running: dict[tuple[str, str], EngineProcess] = {}
        for kv_dtype, (role, one) in itertools.product(types, models.items()):
            progress.report("start", note=f"{role}, {kv_dtype or 'default type of cache'}")
            settings = EngineSettings(one.path, one.name, room, kv_dtype)
            process = stack.enter_context(EngineProcess(one.runner.module, "bench", settings))
            running[role, kv_dtype or process.facts["cache_dtype"]] = process
        cells = _cells(running, prompts, new_tokens, repeats, progress)
        return cells, {variant: process.facts for variant, process in running.items()}


def _cells(
    running: Mapping[tuple[str, str], EngineProcess],
    prompts: Mapping[int, list[int]],
    new_tokens: int,
    repeats: int,
    progress: Progress,
) -> list[MeasuredCell]:
    """All models with all caches at every context, by turns."""
    tokens = [length + new_tokens for length in prompts]
    total = sum(tokens) * len(running) * (repeats + 1)
    done, cells = 0, []

    def timed(variant: tuple[str, str], length: int) -> Run:
        nonlocal done
        process = running[variant]
        said = process.run(prompts[length], new_tokens)
        done += length + new_tokens
        progress.report("measure", done, total, f"context {length}")
        token = process.facts["cache_bytes_per_token"] or 0.0
        return Run(
            prefill=said.prefill_s,
            decode=said.decode_s * new_tokens / said.steps,
            cache_bytes=round(token * length),
            last_cache_bytes=round(token * (length + new_tokens)),
            token_bytes=(token,),
        )

    for length in prompts:
        for variant in running:
            timed(variant, length)  # pages are touched, code is loaded
        runs = interleaved({variant: partial(timed, variant, length) for variant in running}, repeats)
        for (role, label), measured in runs.items():
            cells.append(MeasuredCell(role, label, 1, length, tuple(measured), None, "none"))
    return cells


def _about(one: Runnable, source: str | Path) -> dict[str, Any]:
    """Which model it is, its bytes in the file that was run, and its widths."""
    weights = stored_weights(Path(one.path))
    return {
        "name": name_for_record(source),
        "fingerprint": identity(source),
        "weight_bytes": weights.total,
        "read_bytes": weights.read,
        "d_qk": list(one.d_qk),
        "d_vo": list(one.d_vo),
    }
