"""Training a latent model: one stage on prepared blocks.

`train_stage` is what `compress` calls twice and `kvlatent train` once; everything it needs to go on after a kill lies
in its work directory, see `StageDirectory`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from kvlatent.jobs.devices import resolve_precision
from kvlatent.jobs.fingerprints import blocks_fingerprint, weights_fingerprints
from kvlatent.jobs.processes import join_processes, on_main
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
from kvlatent.training.sharding import is_sharded, place_heads, shard_teacher, trained_tensors
from kvlatent.training.teacher_store import TeacherStore, check_takes_store
from kvlatent.training.trainable import shared_copy, trainable_names
from kvlatent.training.trainers import EndToEndTrainer, LayerTrainer

__all__ = ["forward_put_back", "settings_of", "summary_of", "train_stage"]

_DECIDES_NOTHING = {"save_steps", "keep", "log_steps", "spike_factor"}
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
    allow_change: bool = False,
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
        allow_change: go on in `work_dir` with other rates, tokens, checkpoints or processes than it was begun with.

    Returns:
        stage, steps, tokens, minutes, first_loss, last_loss, tokens_per_second, and for stage I
        first_layer_losses and layer_losses; of several widths "nested_widths", {"d_qk", "d_vo"} of each; with `divergence`
        "checks" and "kept_step" (see `BestKept`); "changes" where something was changed on the way.

    Raises:
        ValueError: the model is not prepared, the teacher has another shape or is a store in stage I or of other
            blocks, there are no blocks, `work_dir` holds another run, a loss is not finite, or bfloat16 is asked of a device without units for it.
        OSError: a checkpoint cannot be written.
        Terminated: SIGTERM came; the state is saved, and the next call goes on.
    """
    join_processes(device)
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
    work_dir = Path(work_dir).absolute()
    args = training_arguments(settings, recipe, stage, len(train_blocks[0]["input_ids"]), work_dir, device)
    plan = _plan(model, stage, settings, recipe, train_blocks, args)
    plan |= {} if store is None else {"teacher": store.record.fingerprint}
    place = StageDirectory(work_dir, plan)
    on_main(lambda: place.open(allow_change=allow_change))
    nested = _nested_widths(model, settings, args, train_blocks, recipe, place.path)
    if place.final.is_file():
        return read_final(place.final, model.get_decoder())
    progress = Progress.of(progress)
    trainer = _trainer(
        model, original if compares else None, args, train_blocks, recipe, stage, place, progress, nested
    )
    best = None if divergence is None else BestKept(divergence, model.get_decoder(), place.path)
    if best is not None:
        trainer.add_callback(best)
    _run(trainer, place.path)
    decoder = trainer.decoder
    if args.activation_checkpointing:
        decoder.activation_checkpointing_disable()
    summary = on_main(lambda: summary_of(read_journal(place.journal), place.changes())) | (
        {} if best is None else best.put_back()
    )
    summary |= {} if nested is None else {"nested_widths": nested.summary()}
    trained = trained_tensors(decoder)
    if decoder is not model.get_decoder():  # the shards of a copy
        for name, tensor in trained.items():
            model.get_decoder().get_parameter(name).data.copy_(tensor)
    on_main(lambda: write_final(place.final, trained, summary))
    return summary


def _nested_widths(
    model: PreTrainedModel,
    settings: Stage,
    args: TrainingArguments,
    blocks: Any,
    recipe: Recipe,
    folder: Path,
) -> NestedWidths | None:
    """The widths that a stage trains, with the model's channels in order; None where it trains the model's own."""
    if not isinstance(settings, Stage2) or settings.nested_kv is None:
        return None
    if is_sharded(args):
        raise ValueError(
            f"stage2.nested_kv={settings.nested_kv} needs whole models: got scale.sharding=fsdp2; pass --set "
            "scale.sharding=none"
        )
    with args.main_process_first(local=False, desc="rank the channels"):
        put_in_order(model, blocks, folder, recipe.dtype)
    return NestedWidths(model, settings.nested_kv, recipe.seed)


def _trainer(
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    args: TrainingArguments,
    blocks: Any,
    recipe: Recipe,
    stage: int,
    place: StageDirectory,
    progress: Progress,
    nested: NestedWidths | None,
) -> StageTrainer:
    """The stage's trainer, with model and teacher where it needs them: on its device, or in shards of their own."""
    settings = settings_of(recipe, stage)
    shards = is_sharded(args)
    student = shared_copy(model) if shards else model
    teacher = None
    if not shards and original is not None:
        teacher = place_teacher(model, original, recipe.dtype, args.device)
    elif not shards:
        model.to(args.device)  # the Trainer moves the decoder alone
    common = (student.get_decoder(), args, blocks, teacher, place.journal, progress, settings.spike_factor)
    if isinstance(settings, Stage2):
        trainer: StageTrainer = EndToEndTrainer(
            *common, head=Head.of_model(student), settings=settings, nested=nested
        )
    else:
        assert isinstance(settings, Stage1)
        trainer = LayerTrainer(*common, settings=settings)
    if shards:
        if original is not None:
            trainer.teacher = shard_teacher(original, trainer.accelerator, recipe.dtype)
        place_heads(args.device, student, trainer.teacher)
    return trainer


def _plan(
    model: PreTrainedModel, stage: int, settings: Stage, recipe: Recipe, blocks: Any, args: TrainingArguments
) -> dict[str, Any]:
    """What decides the stage's result, apart from the trained tensors' start, and what its checkpoints are of."""
    spread = {"processes": args.world_size} if args.world_size > 1 else {}
    spread |= {"sharding": "fsdp2"} if is_sharded(args) else {}
    spread |= {"deepspeed": recipe.scale.deepspeed} if recipe.scale.deepspeed else {}
    return {
        "stage": stage,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "settings": settings.model_dump(mode="json", exclude=_DECIDES_NOTHING),
        "lora": recipe.lora.model_dump(mode="json"),
        **weights_fingerprints(model),
        "blocks": [len(blocks), blocks_fingerprint(blocks)],
        **spread,
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
    """Train to the end from the newest complete checkpoint, which one process looks for."""

    def look() -> Path | None:
        for cut in work_dir.glob(".*.tmp-*"):  # a kill in the middle of an atomic write
            cut.unlink(missing_ok=True)
        return last_complete_checkpoint(work_dir, trainer.args.world_size)

    checkpoint = on_main(look)  # by another, later, it would take away what this one is writing
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


def summary_of(rows: list[dict[str, Any]], changes: Sequence[str] = ()) -> dict[str, Any]:
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
    return summary | ({"changes": changes} if changes else {})
