"""Training a latent model: one stage on prepared blocks, or one stage from checkpoint directory to directory.

`train_stage` is what `compress` calls twice; everything it needs to go on after a kill lies in its work
directory: checkpoints, `metrics.jsonl`, `stage.json` (what the run is) and, once finished,
`final.safetensors` (the trained tensors in fp32 with the summary in the header). `train` is the same for
`kvlatent train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import hub
from ..budget import choose_device
from ..data import prepare
from ..output import prepare_output
from ..recipe import Recipe, Stage, Stage2
from ..record import environment
from ..workspace import Workspace, identity
from .arguments import training_arguments
from .checkpoints import last_complete_checkpoint, read_final, read_journal, write_final
from .claim import claim, stage_identity
from .loop import Progress, StageTrainer
from .teacher import check_teacher, placed_teacher
from .trainable import merged_copy, prepare_for_training, trainable_names, trainable_state
from .trainers import EndToEndTrainer, LayerTrainer

__all__ = ["train", "train_stage"]

FINAL = "final.safetensors"
JOURNAL = "metrics.jsonl"


def train_stage(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    stage: int,
    train_blocks: Any,
    recipe: Recipe,
    work_dir: str | Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run one stage, or what is left of it, on a prepared model, in place.

    Resumes from the newest complete checkpoint in `work_dir`; a stage whose final weights are there is
    loaded, not run. On one CPU process with one torch thread the result does not depend, to the bit, on where
    it was killed.

    Args:
        model: latent causal language model after `prepare_for_training`.
        teacher: the original; only read (a view of it is moved and cast). May be None for stage II on next
            tokens.
        stage: 1 or 2.
        train_blocks: rows of `input_ids`, `position_ids`, `labels` (already shifted, -100: no label), equal
            lengths.
        recipe: `stage1` or `stage2`, `seed` and `dtype` are read.
        work_dir: of this stage alone.
        device: "cpu" or "cuda".
        progress: called after every step with stage, step, total steps, tokens per second, loss.

    Returns:
        stage, steps, tokens, minutes, first_loss, last_loss, tokens_per_second, and for stage I
        first_layer_losses and layer_losses.

    Raises:
        ValueError: the model is not prepared, the teacher has another shape, there are no blocks, `work_dir`
            holds
            another run, or a loss is not finite.
        OSError: a checkpoint cannot be written.
    """
    settings = _settings(recipe, stage)
    needs_teacher = _needs_teacher(settings)
    _check(model, train_blocks)
    if needs_teacher:
        check_teacher(model, teacher)
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    claim(work_dir, stage_identity(model, stage, settings, recipe, train_blocks))
    decoder = model.get_decoder()
    if (work_dir / FINAL).is_file():
        return read_final(work_dir / FINAL, decoder)
    args = training_arguments(settings, recipe, stage, len(train_blocks[0]["input_ids"]), work_dir, device)
    view = (
        placed_teacher(model, teacher, recipe.dtype, args.device)
        if needs_teacher and teacher is not None
        else None
    )
    common = (decoder, args, train_blocks, view, work_dir / JOURNAL, progress)
    if isinstance(settings, Stage2):
        trainer: StageTrainer = EndToEndTrainer(
            *common, head=model.get_output_embeddings(), settings=settings
        )
    else:
        trainer = LayerTrainer(*common)
    _run(trainer, work_dir)
    if settings.activation_checkpointing:
        decoder.activation_checkpointing_disable()
    summary = _summary(read_journal(work_dir / JOURNAL))
    if trainer.is_world_process_zero():
        write_final(work_dir / FINAL, trainable_state(decoder), summary)
    trainer.accelerator.wait_for_everyone()
    return summary


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
) -> dict[str, Any]:
    """Train one stage of a latent checkpoint and write a new one; a second call goes on where the first was
    killed.

    The unfinished run lives in `out.partial`. The output has LoRA merged, the source's type, the resolved
    `recipe.yaml`, `run.json` and `metrics.jsonl`.

    Args:
        model: directory or hub id of a latent checkpoint.
        stage: 1 or 2.
        data: text, as for `data.prepare`.
        out: directory to write; not empty only with `overwrite`.
        teacher: directory or hub id of the original; stage II on next tokens does without.
        recipe: a `Recipe`, a YAML file, or None for the defaults.
        overrides: `section.key=value`, for a recipe that is not a `Recipe`.
        device: "auto", "cpu" or "cuda".
        overwrite: replace `out` and an unfinished run of other arguments.
        progress: as for `train_stage`.

    Returns:
        What `train_stage` returns.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    device = choose_device(device)
    settings = _settings(recipe, stage)
    prepare_output(out, overwrite)
    student = hub.load_model(model)
    tokenizer = hub.load_tokenizer(model, student.config)
    original = None if teacher is None else hub.load_model(teacher)
    if _needs_teacher(settings):
        check_teacher(student, original)
    plan = {
        "model": identity(model),
        "teacher": teacher and identity(teacher),
        "data": identity(data),
        "stage": stage,
    }
    space = Workspace(out, {**plan, "recipe": recipe.model_dump(mode="json")})
    space.open(overwrite=overwrite)
    work_dir = space.path / f"stage{stage}"
    try:
        corpus = prepare(
            data, tokenizer, cache_dir=space.path / "data", seed=recipe.seed, **recipe.data.model_dump()
        )
        prepare_for_training(student, recipe)
        summary = train_stage(
            student, original, stage, corpus.train, recipe, work_dir, device=device, progress=progress
        )
    except Exception:
        if not space.has_work():
            space.remove()
        raise
    run = {"training": {f"stage{stage}": summary}, "seed": recipe.seed, **environment(device)}
    files = {
        "recipe.yaml": recipe.dump_yaml(),
        "run.json": json.dumps(run, indent=2) + "\n",
        JOURNAL: (work_dir / JOURNAL).read_text(encoding="utf-8"),
    }
    hub.save(merged_copy(student), out, tokenizer=tokenizer, files=files, overwrite=overwrite)
    space.remove()
    return summary


def _settings(recipe: Recipe, stage: int) -> Stage:
    if stage not in (1, 2):
        raise ValueError(f"there are two stages: got stage={stage!r}; choose 1 or 2")
    return recipe.stage1 if stage == 1 else recipe.stage2


def _needs_teacher(settings: Stage) -> bool:
    return not (isinstance(settings, Stage2) and settings.objective == "next_token")


def _check(model: PreTrainedModel, train_blocks: Any) -> None:
    expected = set(trainable_names(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained != expected:
        raise ValueError(
            f"the model must train {len(expected)} tensors (attention projections and LoRA) but {len(trained)} are "
            "unfrozen; call prepare_for_training(model, recipe) first"
        )
    if len(train_blocks) == 0:
        raise ValueError(
            "stage training needs at least 1 block of text: got 0; use more text or a smaller block_size"
        )


def _run(trainer: StageTrainer, work_dir: Path) -> None:
    """Train to the end from the newest complete checkpoint; one process at a time looks for it."""
    with trainer.args.main_process_first(local=False, desc="look for a checkpoint"):
        for cut in work_dir.glob(".*.tmp-*"):  # a kill in the middle of an atomic write
            cut.unlink(missing_ok=True)
        checkpoint = last_complete_checkpoint(work_dir, trainer.args.world_size)
    trainer.resume(checkpoint)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last journal line, as figures of the stage."""
    first, last = rows[0], rows[-1]
    summary = {
        "stage": last["stage"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "minutes": round(last["seconds"] / 60, 3),
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-3), 1),
    }
    if "layer_losses" in last:
        summary |= {"first_layer_losses": first["layer_losses"], "layer_losses": last["layer_losses"]}
    return summary
