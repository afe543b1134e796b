"""One stage from checkpoint directory to directory: what `kvlatent train` does.

The unfinished run lives in `OUT.partial`. The output carries what its source carried about its making, with this
stage added: `run.json`, `metrics.jsonl` and the model card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.checkpoints import load as hub
from kvlatent.checkpoints.card import model_card
from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.save import save
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.devices import choose_device
from kvlatent.jobs.fingerprints import fingerprint, identity
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import command_line, environment
from kvlatent.jobs.work_directory import Workspace, prepare_place
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig, table_scope
from kvlatent.model.time_estimate import estimate_seconds, layer_size
from kvlatent.selection.choices import BY_PAIRS, Choices
from kvlatent.text.corpus import prepare
from kvlatent.text.documents import resolve
from kvlatent.training.loop import Progress
from kvlatent.training.placement import check_teacher
from kvlatent.training.stages import JOURNAL, needs_teacher, settings_of, train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.run_record import RunRecord, read_record
from kvlatent.workflows.training_history import history, in_place, joined_journal, options_of

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
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    device = choose_device(device)
    settings_of(recipe, stage)
    if in_place(model, out) and not Path(model).is_dir():
        raise ValueError(
            f"{model} is no local directory, so it cannot be trained in place; check its name, or give --out DIR"
        )
    config = hub.load_config(str(model))
    if not getattr(config, "kv_latent", None):
        raise ValueError(f"{model} is not a latent checkpoint; make one with kvlatent convert first")
    hub.check_block_size(config, recipe.data.block_size)
    latent = latent_config_of(config)
    return Plan(
        choices=Choices(latent.keys, latent.frequencies, latent.values, latent.scale, _table_of(latent)),
        kv=1.0,
        widths=(latent.d_qk, latent.d_vo),
        head_dim=latent.original_head_dim,
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        recipe=recipe,
        stages=(stage,),
        device=device,
        stored_dtype=config.dtype,
        seconds=estimate_seconds(recipe, (stage,), *layer_size(config), config.num_hidden_layers, device),
    )


def _table_of(latent: LatentConfig) -> str:
    """Who shares kept pairs; one table where all keys keep the same channels by rule."""
    return table_scope(latent) if latent.keys in BY_PAIRS else "model"


def train(
    model: str | Path,
    *,
    stage: int,
    data: str | Path,
    out: str | Path,
    teacher: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train one stage of a latent checkpoint and write a new one; a second call goes on where the first was killed.

    The output has LoRA merged, the source's type, a model card, the resolved `recipe.yaml`, and the source's
    `run.json` and `metrics.jsonl` with this stage added.

    Args:
        model: directory or hub id of a latent checkpoint.
        stage: 1 or 2.
        data: text, as for `data.prepare`.
        out: directory to write; not empty only with `overwrite`, or when it is `model` itself (in place).
        teacher: directory or hub id of the original; stage II on next tokens does without.
        recipe: a `Recipe`, a YAML file, or None for the defaults.
        overrides: `section.key=value`, for a recipe that is not a `Recipe`.
        device: "auto", "cpu" or "cuda".
        overwrite: replace `out` and an unfinished run of other arguments.
        progress: as for `train_stage`.
        announce: called with the plan once the arguments have passed their checks, before the work.

    Returns:
        What `train_stage` returns.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    overrides = list(overrides)
    plan = plan_training(model, out, stage=stage, recipe=recipe, overrides=overrides, device=device)
    if needs_teacher(settings_of(plan.recipe, stage)):
        check_teacher(hub.load_config(str(model)), None if teacher is None else hub.load_config(str(teacher)))
    resolve(data)
    inputs = {"teacher": teacher, "data": data, "recipe": recipe}
    place = prepare_place(out, True, inputs if in_place(model, out) else {"model": model, **inputs})
    sources = {
        "model": identity(model),
        "teacher": None if teacher is None else identity(teacher),
        "data": identity(data),
    }
    space = Workspace(place, {**sources, "stage": stage, "recipe": plan.recipe.model_dump(mode="json")})
    if (summary := _finished(space, place, in_place(model, place))) is not None:
        return summary
    replace = overwrite or in_place(model, place)
    prepare_output(place, replace)
    spoken = options_of(model, stage, data, place, teacher, recipe, overrides, device)
    record = {
        "command": command_line("train", model, spoken),
        "fingerprint": fingerprint(space.plan),
        "source": lineage(model),
        "sha256": sources,
        "seed": plan.recipe.seed,
        **environment(plan.device),
    }
    previous = read_record(Path(model) / "run.json") or {}
    space.open(overwrite=overwrite)
    try:
        if announce is not None:
            announce(plan.summary())
        student, tokenizer, summary = _run(space, plan, model, data, teacher, progress)
        record |= history(previous, plan, summary)
        files = {
            "recipe.yaml": plan.recipe.dump_yaml(),
            "run.json": json.dumps(RunRecord.checked(record), indent=2) + "\n",
            JOURNAL: joined_journal(model, stage, space.path / f"stage{stage}" / JOURNAL),
        }
        card = model_card(record)
        save(merged_copy(student), place, tokenizer=tokenizer, card=card, files=files, overwrite=replace)
    except BaseException:
        if not space.has_work():
            space.remove()
        raise
    space.remove()
    return summary


def _run(
    space: Workspace,
    plan: Plan,
    model: str | Path,
    data: str | Path,
    teacher: str | Path | None,
    progress: Progress | None,
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Load everything and train; returns the trained model, its tokenizer and the stage's summary."""
    recipe, (stage,) = plan.recipe, plan.stages
    student = hub.load_model(model)
    tokenizer = hub.load_tokenizer(model, student.config)
    original = None if teacher is None else hub.load_model(teacher)
    corpus = prepare(
        data,
        tokenizer,
        cache_dir=space.path / "data",
        vocab_size=student.config.vocab_size,
        seed=recipe.seed,
        **recipe.data.model_dump(),
    )
    prepare_for_training(student, recipe)
    work_dir = space.path / f"stage{stage}"
    summary = train_stage(
        student, original, stage, corpus.train, recipe, work_dir, device=plan.device, progress=progress
    )
    return student, tokenizer, summary


def _finished(space: Workspace, out: Path, replaced: bool) -> dict[str, Any] | None:
    """The summary of a run that was killed after its output appeared and before its workspace went.

    In place (`replaced`) the source's hash has changed with the output, so only the rest of the plan is compared. A
    workspace whose result is there is removed in any case: what it was for is done.
    """
    if not space.is_ours():
        return None
    try:
        stored = json.loads(space.plan_file.read_text(encoding="utf-8"))
        record = read_record(out / "run.json") or {}
    except (ValueError, RecursionError):  # damaged: `Workspace.open` says so, or `out` is not that run's
        return None
    if record.get("fingerprint") != fingerprint(stored):
        return None
    space.remove()
    ignored = {"model": None} if replaced else {}
    same = {**stored, **ignored} == {**space.plan, **ignored}
    return record["training"][f"stage{stored['stage']}"] if same else None
