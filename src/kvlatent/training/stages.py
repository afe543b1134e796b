"""Training a latent model: one stage on prepared blocks.

`train_stage` is what `compress` calls twice and `kvlatent train` once; everything it needs to go on after a kill lies
in its work directory, see `StageDirectory`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.jobs.devices import resolve_precision
from kvlatent.jobs.fingerprints import blocks_fingerprint, weights_fingerprints
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Recipe, Stage, Stage1, Stage2
from kvlatent.model.head import Head
from kvlatent.model.logit_loss import needs_teacher
from kvlatent.training.held_out_checks import BestKept
from kvlatent.training.loop import StageTrainer, training_arguments
from kvlatent.training.nested_widths import NestedWidths, put_in_order
from kvlatent.training.placement import check_teacher, place_teacher
from kvlatent.training.resume import (
    StageDirectory,
    last_complete_checkpoint,
    read_final,
    read_journal,
    write_final,
)
from kvlatent.training.teacher_store import TeacherStore, check_takes_store
from kvlatent.training.trainable import trainable_names, trainable_state
from kvlatent.training.trainers import EndToEndTrainer, LayerTrainer

__all__ = ["forward_put_back", "settings_of", "summary_of", "train_stage"]

_WRAPPED = ("forward", "_original_forward")  # what accelerate sets on a model that it prepares


def train_stage(
    model: PreTrainedModel,
    teacher: PreTrainedModel | TeacherStore | None,
    stage: int,
    train_blocks: Any,
    recipe: Recipe,
    work_dir: str | Path,
    *,
    device: str = "cpu",
    progress: Progress | Report | None = None,
    divergence: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Run one stage, or what is left of it, on a prepared model, in place.

    Resumes from the newest complete checkpoint in `work_dir`; a stage whose final weights are there is
    loaded, not run. On one CPU process with one torch thread the result does not depend, to the bit, on where
    it was killed.

    Args:
        model: latent causal language model after `prepare_for_training`.
        teacher: the original; only read (a view of it is moved and cast). For stage II what it said of the blocks,
            of which those that are stored are trained on; or None on next tokens.
        stage: 1 or 2.
        train_blocks: rows of `input_ids`, `position_ids`, `labels` (already shifted, -100: no label), equal
            lengths.
        recipe: `stage1` or `stage2`, `seed` and `dtype` are read.
        work_dir: of this stage alone.
        device: "cpu" or "cuda".
        progress: told after every step.
        divergence: of the model as it is, on blocks that are not trained on. The stage ends when it has not fallen for
            several checks, and the weights of the least are the result, which may be those of the start.

    Returns:
        stage, steps, tokens, minutes, first_loss, last_loss, tokens_per_second, and for stage I
        first_layer_losses and layer_losses; of several widths "nested_widths", {"d_qk", "d_vo"} of each; with `divergence` "checks" and "kept_step" (see `BestKept`).

    Raises:
        ValueError: the model is not prepared, the teacher has another shape or is a store in stage I or of other
            blocks, there are no blocks, `work_dir` holds another run, a loss is not finite, or bfloat16 is asked of a device without units for it.
        OSError: a checkpoint cannot be written.
    """
    recipe = resolve_precision(recipe, model.config, device)
    settings = settings_of(recipe, stage)
    compares = needs_teacher(settings)
    _check(model, train_blocks)
    if isinstance(settings, Stage2) and settings.nested_kv is not None:
        NestedWidths(model, settings.nested_kv, recipe.seed)  # refused before anything is written
    store = teacher if isinstance(teacher, TeacherStore) else None
    original = teacher if isinstance(teacher, PreTrainedModel) else None
    if store is not None:
        check_takes_store(stage)
        train_blocks = store.join(train_blocks) if compares else train_blocks
    elif compares:
        check_teacher(model.config, None if original is None else original.config)
    plan = _plan(model, stage, settings, recipe, train_blocks)
    plan |= {} if store is None else {"teacher": store.record.fingerprint}
    place = StageDirectory(work_dir, plan)
    place.open()
    decoder, nested = model.get_decoder(), None
    args = training_arguments(settings, recipe, stage, len(train_blocks[0]["input_ids"]), place.path, device)
    if isinstance(settings, Stage2) and settings.nested_kv is not None:
        with args.main_process_first(local=False, desc="rank the channels"):
            put_in_order(model, train_blocks, place.path, recipe.dtype)
        nested = NestedWidths(model, settings.nested_kv, recipe.seed)
    if place.final.is_file():
        return read_final(place.final, decoder)
    view = None
    if compares and original is not None:
        view = place_teacher(model, original, recipe.dtype, args.device)
    else:
        model.to(args.device)  # the Trainer moves the decoder alone
    common = (decoder, args, train_blocks, view, place.journal, Progress.of(progress))
    if isinstance(settings, Stage2):
        trainer: StageTrainer = EndToEndTrainer(
            *common, head=Head.of_model(model), settings=settings, nested=nested
        )
    else:
        trainer = LayerTrainer(*common, settings=settings)
    best = None if divergence is None else BestKept(divergence, decoder, place.path)
    if best is not None:
        trainer.add_callback(best)
    _run(trainer, place.path)
    if args.activation_checkpointing:
        decoder.activation_checkpointing_disable()
    summary = summary_of(read_journal(place.journal)) | ({} if best is None else best.put_back())
    summary |= {} if nested is None else {"nested_widths": nested.summary()}
    if trainer.is_world_process_zero():
        write_final(place.final, trainable_state(decoder), summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def _plan(model: PreTrainedModel, stage: int, settings: Stage, recipe: Recipe, blocks: Any) -> dict[str, Any]:
    """What decides the stage's result, apart from the trained tensors' start."""
    return {
        "stage": stage,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "settings": settings.model_dump(mode="json", exclude={"save_steps", "keep", "log_steps"}),
        "lora": recipe.lora.model_dump(mode="json"),
        **weights_fingerprints(model),
        "blocks": [len(blocks), blocks_fingerprint(blocks)],
    }


def settings_of(recipe: Recipe, stage: int) -> Stage1 | Stage2:
    """The recipe's section of a stage.

    Raises:
        ValueError: there is no such stage.
    """
    if stage not in (1, 2):
        raise ValueError(f"there are two stages: got stage={stage!r}; choose 1 or 2")
    return recipe.stage1 if stage == 1 else recipe.stage2


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
    with forward_put_back(trainer.decoder):
        trainer.resume(checkpoint)


@contextmanager
def forward_put_back(decoder: Any) -> Generator[None]:
    """Take off the autocast that accelerate wraps a model's forward in for good.

    What is trained would otherwise go on in bfloat16, with outputs in float32, as would every copy of it; its checkpoint,
    loaded, would not.
    """
    before = {name: vars(decoder)[name] for name in _WRAPPED if name in vars(decoder)}
    try:
        yield
    finally:
        for name in _WRAPPED:
            vars(decoder).pop(name, None)
        vars(decoder).update(before)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last line of a journal, as figures of the stage."""
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
