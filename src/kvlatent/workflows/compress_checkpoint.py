"""`compress`: a checkpoint and a text in, a trained, measured, loadable latent checkpoint out.

Steps, in order: plan; calibrate; measure the original; convert and measure; stage I and measure; stage II; merge,
measure what is written, save. Each step leaves its figures in the workspace beside the output, so the whole can be
killed anywhere and called again: a step whose figures are there is not repeated, a stage continues from its newest
complete checkpoint. The output directory appears in one rename at the very end.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.fingerprints import fingerprint
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Scale
from kvlatent.jobs.work_directory import partial_of, prepare_place
from kvlatent.text.parts import check_statistics
from kvlatent.training.resume import RunDirectory
from kvlatent.training.teacher_store import RECORD
from kvlatent.workflows.compress_steps import CompressRun
from kvlatent.workflows.losses import judge_losses, warn_of_losses
from kvlatent.workflows.minutes import Budget, TooFewMinutes, keys_of
from kvlatent.workflows.run_plan import Plan, plan_run
from kvlatent.workflows.run_record import finished_record
from kvlatent.workflows.steps import (
    EVALUATION_TOKENS,
    Announce,
    check_texts,
    describe_run,
    hash_sources,
    options_as_typed,
)
from kvlatent.workflows.stored_teacher import check_store, open_store

__all__ = ["compress"]


def compress(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    eval_data: str | Path | None = None,
    statistics: str | Path | None = None,
    teacher: str | Path | None = None,
    eval_tokens: int = EVALUATION_TOKENS,
    overwrite: bool = False,
    allow_change: bool = False,
    dry_run: bool = False,
    progress: Progress | Report | None = None,
    announce: Announce | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compress `model` with text from `data` and save the result in `out`.

    A call that was killed continues when it is repeated with the same arguments.

    Args:
        model: directory, hub id or GGUF file of the original.
        data: training text: .txt, .jsonl, .json, .parquet or a hub data set. The calibration looks at a sample of it.
        out: directory to write; `out.partial` beside it holds unfinished work.
        eval_data: text to measure on; None takes the part of `data` that is held out from training.
        statistics: file of an earlier calibration of this model, which is then not repeated.
        teacher: what `teach` wrote of this model and text; stage II is trained from it, and the original leaves the memory.
        eval_tokens: measure on at most that many tokens.
        overwrite: replace what `out` holds (at the end, in one rename) and unfinished work of other arguments.
        allow_change: continue an unfinished run with other rates, tokens or checkpoints of its stages than it was begun with.
        dry_run: return the plan and write nothing.
        progress, announce: see `Progress` and `Announce`.
        options: see `RUN_OPTIONS`.

    Returns:
        The JSON-able record of the run, which is also written as `out/run.json`; or the plan. Where the held-out text says
        that users would not want the result, a sentence in its "warnings", which is a warning of Python's, too.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    plan = plan_run(model, **options)
    _check_ways(plan, allow_change)
    files = {"data": data, "eval_data": eval_data, "statistics": statistics}
    inputs = {"model": model, **files, "teacher": teacher, "recipe": options.get("recipe")}
    if dry_run:
        prepare_place(out, overwrite, inputs)
        return {"plan": plan.summary()}
    check_texts(data, eval_data)
    store = None if teacher is None else open_store(teacher, plan)
    # The place first, as it may hold the finished run; then what it holds.
    place = prepare_place(out, True, inputs)
    if statistics is not None:
        check_statistics(statistics, plan.calibrates)
    taught = {} if store is None else {"teacher": store.path / RECORD}
    sha256 = hash_sources({"model": model, **files, **taught}, "training text")
    workspace = RunDirectory(partial_of(place), {**sha256, "eval_tokens": eval_tokens, **_decisions(plan)})
    if (finished := finished_record(place, workspace)) is not None:
        warn_of_losses(finished)
        return finished
    prepare_output(out, overwrite)
    if store is not None:
        check_store(store, model, plan, sha256, has_other_text=eval_data is not None)
    typed = options_as_typed({**files, "teacher": teacher, "out": place}, options)
    record = describe_run("compress", model, typed, sha256, plan.device)
    record["fingerprint"] = fingerprint(workspace.plan)
    workspace.open(overwrite=overwrite, allow_change=allow_change)
    try:
        budget = None if plan.minutes is None else Budget(plan.minutes)
        searches = "stage2.learning_rate" not in keys_of(options.get("overrides"))
        run = CompressRun(
            plan, workspace, Progress.of(progress), model, budget, searches=searches, store=store,
            allow_change=allow_change,
        )  # fmt: skip
        texts = run.read(data, eval_data, eval_tokens)
        if announce is not None:
            announce(plan.summary())
        exported, results = run.all_steps(texts, statistics)
        record |= results
        judged = judge_losses("compress", record["figures"], run.plan, options, partial(plan_run, model))
        record["warnings"] = [*run.sentences, *judged]
        run.save(exported, record, place, overwrite)
    except BaseException as error:
        if isinstance(error, TooFewMinutes) or not workspace.has_work():
            workspace.remove()
        raise
    workspace.remove()
    warn_of_losses(record)
    return record


def _check_ways(plan: Plan, allow_change: bool) -> None:
    """Raise `ValueError` where the plan is changed on the way though it decides itself, or spreads over processes."""
    if allow_change and plan.minutes is not None:
        raise ValueError(
            f"--minutes decides rate and tokens itself, and --allow-change would change them: got --minutes "
            f"{plan.minutes:g}; leave one out"
        )
    if plan.stages and plan.recipe.scale != Scale():
        raise ValueError(
            f"compress trains in one process, and the recipe spreads over several: got {plan.recipe.scale!r}; call kvlatent "
            "convert, then torchrun --nproc-per-node N -m kvlatent_cli train for each stage, or pass --set scale.sharding=none"
        )


def _decisions(plan: Plan) -> dict[str, Any]:
    """What decides the result of a run, beside what it reads."""
    widths: dict[str, Any] = {"engine": plan.engine}
    if plan.widths is None:
        widths |= {"kv": plan.kv, "per_layer": plan.per_layer}
    else:
        widths |= plan.widths.to_dict()
    return {
        **({} if plan.minutes is None else {"minutes": plan.minutes}),
        "stages": list(plan.stages),
        "device": plan.device,
        "conversion": widths,
        "recipe": plan.recipe.model_dump(mode="json"),
    }
