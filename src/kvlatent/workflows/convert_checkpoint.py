"""A conversion alone, from checkpoint to checkpoint: with text or statistics calibrated, measured where there is text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.evaluation.recall import compare_recall
from kvlatent.evaluation.standard import evaluate
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.devices import working_dtype
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import TextReader, Texts, check_sources, read_texts
from kvlatent.training.trainable import merged_copy
from kvlatent.workflows.foreseen_steps import expect_steps
from kvlatent.workflows.losses import judge_losses, warn_of_losses
from kvlatent.workflows.minutes import Budget, noted, tokens_to_measure
from kvlatent.workflows.run_plan import Plan, plan_run
from kvlatent.workflows.steps import (
    EVALUATION_TOKENS,
    Announce,
    calibrate_or_load,
    check_texts,
    convert_and_report,
    describe_run,
    hash_sources,
    load_original,
    measure_copying,
    options_as_typed,
    save_run,
)
from kvlatent.workflows.streamed_conversion import convert_streamed
from kvlatent.workflows.streamed_plan import why_streamed
from kvlatent.workflows.timed_conversion import convert_in_minutes
from kvlatent.workflows.width_choice import resolve_widths

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    statistics: str | Path | None = None,
    eval_tokens: int = EVALUATION_TOKENS,
    overwrite: bool = False,
    dry_run: bool = False,
    stream: bool = False,
    progress: Progress | Report | None = None,
    announce: Announce | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert `model` and save it untrained, in the original's dtype.

    Args:
        model, out, overwrite, dry_run, progress, announce: as for `compress`.
        data: text to calibrate on, less a part that is held out to measure on. A preset that looks at no text measures
            on all of it. None, without `statistics`, falls back to what the weights alone say.
        eval_data: another text to measure on.
        statistics: file of an earlier calibration of this model, instead of `data`.
        eval_tokens: measure on at most that many tokens.
        stream: one decoder layer in memory at a time (see `convert_streamed`), as is done without being asked where the
            model would not fit.
        options: see `RUN_OPTIONS`; the stages are "none" here. With `minutes`, of the whole call, the steps of alignment and
            of the global pass are as many as fit by this machine's speed; the recipe that is written names them, and
            "minutes" of the record says what each took and gained.

    Returns:
        The JSON-able record that is written as `out/run.json`; or the plan. Where the held-out text says that users would
        not want the result, a sentence in its "warnings", which is a warning of Python's, too.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    has_text = data is not None or statistics is not None
    reason = why_streamed(model, asked=stream, calibrates=has_text, device=options.get("device"))
    if reason is not None:
        given: dict[str, Any] = {"data": data, "eval_data": eval_data, "statistics": statistics}
        given |= {"overwrite": overwrite, "dry_run": dry_run, "announce": announce, "reason": reason}
        told = Progress.of(progress)
        return convert_streamed(model, out, **given, eval_tokens=eval_tokens, progress=told, **options)
    options |= {"stages": "none"}
    budget = None if options.get("minutes") is None else Budget(options["minutes"])
    replan = partial(
        plan_run,
        model,
        has_text=has_text,
        is_measured=data is not None or eval_data is not None,
    )
    plan = replan(**options)
    files = {"data": data, "eval_data": eval_data, "statistics": statistics}
    place = prepare_output(out, overwrite, {"model": model, **files, "recipe": options.get("recipe")})
    check_sources(data, statistics, eval_data, calibrates=plan.calibrates)
    if dry_run:
        return {"plan": plan.summary()}
    check_texts(data, eval_data)
    sha256 = hash_sources({"model": model, **files}, "text to calibrate on")
    typed = options_as_typed({**files, "out": place}, {**options, "stages": None})
    record = describe_run("convert", model, typed, sha256, plan.device)
    report = Progress.of(progress)
    dtype = working_dtype(plan.recipe.dtype, plan.device, plan.stored_dtype) if plan.calibrates else None
    original, tokenizer = load_original(model, dtype, plan.device, report)
    with scratch_folder() as cache:
        reader = TextReader(plan.recipe, tokenizer, original.config, cache)
        texts = read_texts(reader, data, eval_data, eval_tokens=eval_tokens, calibrates=plan.calibrates)
        if announce is not None:
            announce(plan.summary())
        if budget is not None:
            tokens = tokens_to_measure(texts.held_out, models=2, recalls=2)
            expect_steps(budget, original, plan, texts.train, statistics, report, tokens_to_measure=tokens)
        with noted(budget, "calibration", report) as told:
            seen, record["calibration"] = calibrate_or_load(
                plan, original, tokenizer, texts, statistics, told
            )
        plan, latent, conversion = _convert(plan, original, seen, texts, budget, report)
        record |= {"plan": plan.summary(), "conversion": conversion}
        exported = merged_copy(latent, plan.stored_dtype)
        record["figures"] = _measure_both(plan, original, exported, tokenizer, texts, report)
    if budget is not None:
        record["minutes"] = budget.summary(record["conversion"])
    record["warnings"] = judge_losses("convert", record["figures"], plan, options, replan)
    save_run(exported, place, record, plan.recipe, tokenizer, source=model, overwrite=overwrite)
    warn_of_losses(record)
    return record


def _convert(
    plan: Plan,
    original: PreTrainedModel,
    statistics: Statistics | None,
    texts: Texts,
    budget: Budget | None,
    progress: Progress,
) -> tuple[Plan, PreTrainedModel, dict[str, Any]]:
    """The plan with what was decided on the way, the latent model, and the figures of the conversion."""
    with noted(budget, "widths", progress) as told:
        plan, predicted = resolve_widths(plan, original, statistics, told)
    if budget is None:
        latent, conversion = convert_and_report(original, plan, statistics, progress)
        return plan, latent, conversion | {"predicted": predicted}
    assert statistics is not None, "plan_run refuses minutes without"
    tokens = tokens_to_measure(texts.held_out, models=2, recalls=2)
    plan, latent, conversion = convert_in_minutes(
        original, plan, statistics, budget, progress, tokens_to_measure=tokens
    )
    return replace(plan, minutes=None), latent, conversion | {"predicted": predicted}


def _measure_both(
    plan: Plan,
    original: PreTrainedModel,
    exported: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    progress: Progress,
) -> dict[str, Any]:
    """Figures of both models, in the dtype that they run in; none without a text to measure on."""
    if texts.held_out is None:
        return {}
    dtype = getattr(torch, working_dtype(plan.recipe.dtype, plan.device, plan.stored_dtype))
    pair = merged_copy(exported, dtype), merged_copy(original, dtype)
    report = evaluate(pair[0], texts.held_out, against=pair[1], progress=progress)
    ratio = {name: report[name] for name in ("ratio", "ratio_standard_error")}
    figures = {"original": report["original"], "latent": report["latent"] | ratio}
    for name, each in zip(("latent", "original"), pair, strict=True):
        figures[name] |= measure_copying(name, each, tokenizer, texts.held_out, progress)
    return compare_recall(figures)
