"""One stage from checkpoint directory to directory: what `kvlatent train` does.

The unfinished run lives in `OUT.partial`. The output carries what its source carried about its making, with this
stage added: `run.json`, `metrics.jsonl` and the model card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.checkpoints.load import check_block_size, load_config, load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.devices import check_precision, choose_device, resolve_precision
from kvlatent.jobs.fingerprints import fingerprint
from kvlatent.jobs.processes import is_main, join_processes, on_main
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import joined_metrics
from kvlatent.jobs.work_directory import WorkDirectory, partial_of, prepare_place
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of
from kvlatent.model.logit_loss import needs_teacher
from kvlatent.model.time_estimate import estimate_seconds, layer_size
from kvlatent.text.parts import TextReader
from kvlatent.training.placement import check_teacher, view_of_teacher
from kvlatent.training.resume import JOURNAL, RunDirectory
from kvlatent.training.stages import settings_of, train_stage
from kvlatent.training.teacher_store import RECORD, TeacherStore, check_takes_store, is_store
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.continued_record import continue_history, load_latent_config, plan_of_latent
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.run_record import read_record
from kvlatent.workflows.settings import check_target, check_trackers, recipe_overrides
from kvlatent.workflows.steps import (
    Announce,
    check_texts,
    describe_run,
    files_of_run,
    hash_sources,
    options_as_typed,
    save_run,
)
from kvlatent.workflows.streamed_training import StreamedRun, why_training_streams

__all__ = ["plan_training", "train"]


def plan_training(
    model: str | Path,
    out: str | Path,
    *,
    stage: int,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    device: str = "auto",
) -> Plan:
    """What `train` would do with these arguments; reads the model's config, not its weights.

    Raises:
        ValueError: an argument or recipe key that cannot be, a model that is not latent or not here to be replaced,
            blocks longer than its context.
        FileNotFoundError: no such model.
    """
    device = choose_device(device)
    recipe = Recipe.load(recipe, overrides)
    check_precision(recipe.dtype, device)
    settings_of(recipe, stage)
    if _is_in_place(model, out) and not Path(model).is_dir():
        raise ValueError(
            f"{model} is no local directory, so it cannot be trained in place; check its name, or give --out DIR"
        )
    config = load_latent_config(model)
    recipe = resolve_precision(recipe, config, device)
    check_block_size(config, recipe.data.block_size)
    latent = latent_config_of(config)
    check_trackers(recipe)
    num_layers = len(attention_layers_of(config))
    check_target(recipe, config, latent.widths.share(latent.original_head_dim, num_layers))
    seconds = estimate_seconds(recipe, (stage,), *layer_size(config), config.num_hidden_layers, device)
    return plan_of_latent(config, recipe, stages=(stage,), device=device, seconds=seconds)


def train(
    model: str | Path,
    *,
    stage: int,
    data: str | Path,
    out: str | Path,
    teacher: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    tokens: int | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    allow_change: bool = False,
    stream: bool = False,
    progress: Progress | Callable[[int, int, int, float, float], None] | None = None,
    announce: Announce | None = None,
) -> dict[str, Any]:
    """Train one stage of a latent checkpoint and write a new one; a second call goes on where the first was killed.

    The output has LoRA merged, the source's type, a model card, the resolved `recipe.yaml`, and the source's
    `run.json` and `metrics.jsonl` with this stage added.

    Args:
        model: directory or hub id of a latent checkpoint.
        stage: 1 or 2.
        data: text, as for `corpus.prepare`.
        out: directory to write; not empty only with `overwrite`, or when it is `model` itself (in place).
        teacher: directory, hub id or GGUF file of the original; or, for stage II, what `teach` wrote of this text, and the
            original is not loaded. Stage II on next tokens does without.
        recipe: a `Recipe`, a YAML file, or None for the defaults.
        overrides: `section.key=value` on top of it; tokens, dtype, seed: of the stage, on top of both.
        device: "auto", "cpu" or "cuda".
        overwrite: replace `out` and an unfinished run of other arguments.
        allow_change: continue an unfinished run with other rates, tokens or checkpoints than it was begun with.
        stream: hold one decoder layer in memory at a time, in stage I; by itself where the models do not fit.
        progress: told after every step; a function is called with stage, step, steps, tokens per second and loss.
        announce: called with the plan once the arguments have passed their checks, before the work.

    Returns:
        What `train_stage` returns.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    given: dict[str, Any] = {"overrides": list(overrides), "dtype": dtype, "seed": seed}
    settings = recipe_overrides(given)
    if tokens is not None and stage in (1, 2):
        settings.append(f"stage{stage}.tokens={tokens}")
    plan = plan_training(model, out, stage=stage, recipe=recipe, overrides=settings, device=device)
    check_texts(data)
    store = _check_teacher(model, teacher, plan)
    processes = join_processes(plan.device)
    reason = why_training_streams(model, teacher, plan, asked=stream, processes=processes)
    inputs = {"teacher": teacher, "data": data, "recipe": recipe}
    read = inputs if _is_in_place(model, out) else {"model": model, **inputs}
    place = on_main(lambda: prepare_place(out, True, read))
    replaced = _is_in_place(model, place)
    taught = teacher if store is None else store.path / RECORD
    sources = {"model": model, "teacher": taught, "data": data}
    sha256 = on_main(lambda: hash_sources(sources, "training text"))
    space = RunDirectory(
        partial_of(place), {**sha256, "stage": stage, "recipe": plan.recipe.model_dump(mode="json")}
    )
    if (summary := on_main(lambda: _finished(space, place, replaced))) is not None:
        return summary
    on_main(lambda: prepare_output(place, overwrite or replaced))
    _check_store(store, model, plan, sha256)
    files = {"data": data, "teacher": teacher, "out": None if replaced else place}
    options = {"stage": stage, "recipe": recipe, **given, "tokens": tokens, "device": device}
    typed = options_as_typed(files, options | {"stream": reason is not None})
    record = describe_run("train", model, typed, sha256, plan.device)
    streamed = None if reason is None else StreamedRun(model, str(teacher), plan, place)
    on_main(lambda: space.open(overwrite=overwrite, allow_change=allow_change))
    try:
        if announce is not None:
            announce(_with_costs(plan, streamed, reason).summary())
        told = Progress.of(progress, ("stage", "done", "total", "tokens_per_second", "loss"))
        if streamed is not None:
            tokenizer, summary = streamed.train(space, data, told)
            written = _history(record, space, plan, model, summary)
            streamed.finish(space, tokenizer, files_of_run(record, plan.recipe) | written)
        else:
            trained = _run_stage(space, plan, model, data, store or teacher, told, allow_change)
            on_main(lambda: _save(trained, record, space, plan, model, place, overwrite or replaced))
            summary = trained[-1]
    except BaseException as error:
        bad_input = streamed is not None and isinstance(error, ValueError)  # nothing is worth going on from
        if is_main() and (bad_input or not space.has_work()):
            space.remove()
        raise
    on_main(space.remove)
    return summary


def _save(
    trained: tuple[PreTrainedModel, Any, dict[str, Any]],
    record: dict[str, Any],
    space: WorkDirectory,
    plan: Plan,
    model: str | Path,
    place: Path,
    overwrite: bool,
) -> None:
    """Write the checkpoint with its history."""
    student, tokenizer, summary = trained
    files = _history(record, space, plan, model, summary)
    more: dict[str, Any] = {"source": model, "overwrite": overwrite, "files": files}
    save_run(merged_copy(student), place, record, plan.recipe, tokenizer, **more)


def _history(
    record: dict[str, Any], space: WorkDirectory, plan: Plan, model: str | Path, summary: dict[str, Any]
) -> dict[str, str]:
    """Add what was trained to the record; the journal to write beside it, by its name."""
    (stage,) = plan.stages
    record |= {"fingerprint": fingerprint(space.plan), "seed": plan.recipe.seed}
    record |= continue_history(read_record(Path(model) / "run.json") or {}, plan, summary)
    return {JOURNAL: _join_journals(model, stage, space.path / f"stage{stage}" / JOURNAL)}


def _run_stage(
    space: WorkDirectory,
    plan: Plan,
    model: str | Path,
    data: str | Path,
    teacher: str | Path | TeacherStore | None,
    progress: Progress,
    allow_change: bool,
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Load everything and train; returns the trained model, its tokenizer and the stage's summary."""
    recipe, (stage,) = plan.recipe, plan.stages
    student = load_model(model)
    tokenizer = load_tokenizer(model, student.config)
    prepare_for_training(student, recipe)
    # What both checkpoints hold is in memory once.
    original = (
        view_of_teacher(student, load_model(teacher), recipe.dtype)
        if isinstance(teacher, str | Path)
        else teacher
    )
    reader = TextReader(recipe, tokenizer, student.config, space.path / "data")
    on_main(lambda: reader.prepare(data) and None)  # the others find it on the disk
    blocks = reader.prepare(data).train
    work_dir = space.path / f"stage{stage}"
    summary = train_stage(
        student, original, stage, blocks, recipe, work_dir,
        device=plan.device, progress=progress, allow_change=allow_change,
    )  # fmt: skip
    return student, tokenizer, summary


def _check_teacher(model: str | Path, teacher: str | Path | None, plan: Plan) -> TeacherStore | None:
    """Raise `ValueError` where the stage cannot learn from this teacher; returns it where it is a store."""
    (stage,) = plan.stages
    if teacher is not None and is_store(teacher):
        check_takes_store(stage)
        return TeacherStore(teacher)
    if needs_teacher(settings_of(plan.recipe, stage)):
        check_teacher(load_config(str(model)), None if teacher is None else load_config(str(teacher)))
    return None


def _check_store(
    store: TeacherStore | None, model: str | Path, plan: Plan, sha256: Mapping[str, Any]
) -> None:
    """Raise `ValueError` where a store that the stage learns from is of another text, tokenizer or recipe."""
    if store is not None and needs_teacher(settings_of(plan.recipe, plan.stages[0])):
        config = load_config(str(model))
        store.check(config, load_tokenizer(model, config), plan.recipe, sha256)


def _with_costs(plan: Plan, streamed: StreamedRun | None, reason: str | None) -> Plan:
    """The plan, and of one that streams why it does and what it will take."""
    if streamed is None:
        return plan
    return replace(plan, notes=(f"streamed, layer by layer, as {reason}", streamed.costs.sentence()))


def _finished(space: WorkDirectory, out: Path, replaced: bool) -> dict[str, Any] | None:
    """The summary of a run that was killed after its output appeared and before its workspace went.

    In place (`replaced`) the source's hash has changed with the output, so only the rest of the plan is compared. A
    workspace whose result is there is removed in any case: what it was for is done.
    """
    if not space.is_ours():
        return None
    try:
        stored = json.loads(space.plan_file.read_text(encoding="utf-8"))
        record = read_record(out / "run.json") or {}
    except (ValueError, RecursionError):  # damaged: `WorkDirectory.open` says so, or `out` is not that run's
        return None
    if record.get("fingerprint") != fingerprint(stored):
        return None
    space.remove()
    ignored = {"model": None} if replaced else {}
    same = {**stored, **ignored} == {**space.plan, **ignored}
    return record["training"][f"stage{stored['stage']}"] if same else None


def _is_in_place(model: str | Path, out: str | Path) -> bool:
    """Whether the output replaces its own source."""
    return Path(out).resolve() == Path(model).resolve()


def _join_journals(model: str | Path, stage: int, journal: Path) -> str:
    """The source's metrics, and after them this stage's."""
    old = Path(model) / journal.name
    before = old.read_text(encoding="utf-8") if old.is_file() else ""
    return before + joined_metrics([(f"stage{stage}", journal)])
