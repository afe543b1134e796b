"""`compress`: a checkpoint and a text in, a trained, measured, loadable latent checkpoint out.

Steps, in order: plan; calibrate; measure the original; convert and measure; stage I and measure; stage II; merge,
measure what is written, save. Each step leaves its figures in the workspace beside the output, so the whole can be
killed anywhere and called again. The output directory appears in one rename at the very end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from kvlatent.checkpoints.lineage import lineage
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.fingerprints import fingerprint, identity
from kvlatent.jobs.record import command_line, environment, spoken_name
from kvlatent.jobs.work_directory import Workspace, prepare_place
from kvlatent.text.documents import resolve
from kvlatent.text.parts import check_statistics
from kvlatent.workflows.compress_steps import Run
from kvlatent.workflows.run_plan import Plan, plan_run
from kvlatent.workflows.run_record import read_record
from kvlatent.workflows.settings import PlanOptions
from kvlatent.workflows.steps import Progress

__all__ = ["Announce", "Progress", "compress", "inputs_of", "silent", "spoken"]

EVALUATION_TOKENS = 65_536

Announce = Callable[[dict[str, Any]], None]
"""Called with the plan once every argument, the model and the text have passed their checks, before the work."""


def compress(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    eval_data: str | Path | None = None,
    statistics: str | Path | None = None,
    eval_tokens: int = EVALUATION_TOKENS,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Announce | None = None,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Compress `model` with text from `data` and save the result in `out`.

    A call that was killed continues when it is repeated with the same arguments.

    Args:
        model: directory or hub id of the original.
        data: training text: .txt, .jsonl, .json, .parquet or a hub data set. The calibration looks at a sample of it.
        out: directory to write; `out.partial` beside it holds unfinished work.
        eval_data: text to measure on; None takes the part of `data` that is held out from training.
        statistics: file of an earlier calibration of this model, which is then not repeated.
        eval_tokens: measure on at most that many tokens.
        overwrite: replace what `out` holds (at the end, in one rename) and unfinished work of other arguments.
        dry_run: return the plan and write nothing.
        progress, announce: see `Progress` and `Announce`.
        options: see `PlanOptions`.

    Returns:
        The JSON-able record of the run, which is also written as `out/run.json`; or the plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    plan = plan_run(model, **options)
    files = {"data": data, "eval_data": eval_data, "statistics": statistics}
    inputs = inputs_of({"model": model, **files}, options)
    if dry_run:
        prepare_place(out, overwrite, inputs)
        return {"plan": plan.summary()}
    for source in (data, eval_data):
        if source is not None:
            resolve(source)
    # The place first, as it may hold the finished run; then what it holds.
    place = prepare_place(out, True, inputs)
    decides = _decides(plan, model, data, eval_data, statistics, eval_tokens)
    workspace = Workspace(place, decides)
    if (finished := _finished(place, workspace)) is not None:
        return finished
    prepare_output(out, overwrite)
    workspace.open(overwrite=overwrite)
    record = {
        "command": command_line("compress", model, spoken({**files, "out": place}, options)),
        "fingerprint": fingerprint(workspace.plan),
        "plan": plan.summary(),
        "source": lineage(model),
        "sha256": {name: decides[name] for name in ("model", "data", "eval_data", "statistics")},
        **environment(plan.device),
    }
    run = Run(plan, workspace, progress or silent, statistics)
    try:
        run.prepare(model, data, eval_data, eval_tokens)
        if announce is not None:
            announce(record["plan"])
        result = run.all_steps(record, place, overwrite)
    except BaseException:
        if not workspace.has_work():
            workspace.remove()
        raise
    workspace.remove()
    return result


def _decides(
    plan: Plan,
    model: str | Path,
    data: str | Path,
    eval_data: str | Path | None,
    statistics: str | Path | None,
    eval_tokens: int,
) -> dict[str, Any]:
    """Everything that decides the result of a run.

    Raises:
        ValueError: the figures would be of the text that was trained on, or nothing looks at the statistics.
        FileNotFoundError: no such statistics.
    """
    if statistics is not None:
        check_statistics(statistics, plan.calibrates)
    widths: dict[str, Any] = {"engine": plan.engine}
    if plan.widths is None:
        widths |= {"kv": plan.kv, "per_layer": plan.per_layer}
    else:
        widths |= dict(zip(("d_qk", "d_vo"), plan.widths, strict=True))
    decides = {
        "model": identity(model),
        "data": identity(data),
        "eval_data": None if eval_data is None else identity(eval_data),
        "statistics": None if statistics is None else identity(statistics),
        "eval_tokens": eval_tokens,
        "stages": list(plan.stages),
        "device": plan.device,
        "conversion": widths,
        "recipe": plan.recipe.model_dump(mode="json"),
    }
    if decides["data"] == decides["eval_data"]:
        raise ValueError(
            "--eval-data is the training text; leave it out to measure on a held-out part, or give another file"
        )
    return decides


def silent(step: str, done: int, total: int, note: str) -> None:
    """The progress of a caller who did not ask for any."""


def spoken(files: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as the command line spells them; files by their last name, but for those of the hub."""
    named = {
        name: Path(value).name if name == "out" else spoken_name(value)
        for name, value in files.items()
        if value
    }
    spelled = {("set" if name == "overrides" else name): value for name, value in options.items()}
    if spelled.get("recipe"):
        spelled["recipe"] = Path(spelled["recipe"])
    return named | spelled


def inputs_of(sources: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a call reads and so must not write to: its sources, and the recipe among its options."""
    return {**sources, "recipe": options.get("recipe")}


def _finished(out: Path, workspace: Workspace) -> dict[str, Any] | None:
    """The record of a run that was killed after its output appeared and before its workspace went."""
    try:
        found = read_record(out / "run.json") if workspace.is_ours() else None
    except ValueError:  # damaged, so `out` is not that run's
        return None
    if found is None or found.get("fingerprint") != fingerprint(workspace.plan):
        return None
    workspace.remove()
    return found
