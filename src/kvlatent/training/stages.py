"""Training a latent model: one stage on prepared blocks.

`train_stage` is what `compress` calls twice and `kvlatent train` once; everything it needs to go on after a kill lies
in its work directory: checkpoints, `metrics.jsonl`, `stage.json` (what the run is) and, once finished,
`final.safetensors` (the trained tensors in fp32 with the summary in the header).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.jobs.recipe import Recipe, Stage, Stage2
from kvlatent.training.arguments import training_arguments
from kvlatent.training.claim import claim, stage_identity
from kvlatent.training.loop import Progress, StageTrainer
from kvlatent.training.placement import check_teacher, placed_teacher
from kvlatent.training.resume import last_complete_checkpoint, read_final, read_journal, write_final
from kvlatent.training.trainable import trainable_names, trainable_state
from kvlatent.training.trainers import EndToEndTrainer, LayerTrainer

__all__ = ["JOURNAL", "needs_teacher", "settings_of", "train_stage"]

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
    settings = settings_of(recipe, stage)
    compares = needs_teacher(settings)
    _check(model, train_blocks)
    if compares:
        check_teacher(model.config, None if teacher is None else teacher.config)
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    claim(work_dir, stage_identity(model, stage, settings, recipe, train_blocks))
    decoder = model.get_decoder()
    if (work_dir / FINAL).is_file():
        return read_final(work_dir / FINAL, decoder)
    args = training_arguments(settings, recipe, stage, len(train_blocks[0]["input_ids"]), work_dir, device)
    view = (
        placed_teacher(model, teacher, recipe.dtype, args.device)
        if compares and teacher is not None
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


def settings_of(recipe: Recipe, stage: int) -> Stage:
    """The recipe's section of a stage.

    Raises:
        ValueError: there is no such stage.
    """
    if stage not in (1, 2):
        raise ValueError(f"there are two stages: got stage={stage!r}; choose 1 or 2")
    return recipe.stage1 if stage == 1 else recipe.stage2


def needs_teacher(settings: Stage) -> bool:
    """Whether the stage's loss looks at the original."""
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
