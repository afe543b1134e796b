"""The training loop of both stages, a `transformers.Trainer`: one loop from one CPU to many GPUs.

What differs from the stock loop and its arguments, and why: the loss is a mean per token over the whole accumulated
batch; a loss or gradient that is not finite ends the run before the optimiser sees it; checkpoints hold the trained
tensors only; metrics go to a journal file instead of every checkpoint's state.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe, Stage
from kvlatent.training.resume import (
    WEIGHTS,
    last_complete_checkpoint,
    load_trainable,
    read_journal,
    trim_journal,
)
from kvlatent.training.trainable import trainable_state

__all__ = ["StageTrainer", "collate", "training_arguments"]

_DISK_SIGNS = (
    "No space left",
    "File too large",
    "inline_container",
    "unexpected pos",
)  # torch names no cause


def training_arguments(
    settings: Stage, recipe: Recipe, stage: int, block_size: int, work_dir: Path, device: str
) -> TrainingArguments:
    """Upstream's arguments for one stage; `settings.tokens` is rounded up to whole optimiser steps."""
    args = TrainingArguments(
        output_dir=str(work_dir),
        seed=recipe.seed + stage,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=device == "cpu",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.activation_checkpointing,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.keep,
        logging_strategy="steps",
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite ends the run instead
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,  # hook losses are not in the forward's output: True dies
        disable_tqdm=True,
        report_to="none",
        max_steps=1,
    )
    if args.n_gpu > 1:
        args._n_gpu = (
            1  # one process uses one GPU; several go through torchrun (DataParallel breaks the hooks)
        )
    per_step = settings.batch_size * settings.gradient_accumulation * block_size * args.world_size
    args.max_steps = math.ceil(settings.tokens / per_step)
    args.warmup_steps = math.ceil(settings.warmup_ratio * args.max_steps)
    return args


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of equal length to a batch of tensors [B, T, ...]: int64, but for shares, which stay as they are."""
    return {key: torch.stack([_whole_numbers(row[key]) for row in rows]) for key in rows[0]}


def _whole_numbers(column: Any) -> Tensor:
    tensor = torch.as_tensor(column)
    return tensor if tensor.is_floating_point() else tensor.long()


class StageTrainer(Trainer):
    """What both stages share; a stage defines `batch_loss` and `num_items`.

    Args:
        decoder: the prepared latent decoder.
        args: from `training_arguments`.
        blocks: rows with `input_ids`, `position_ids`, `labels` of one length.
        teacher: the original's causal language model on the same device, frozen, or None.
        journal: the metrics file, one JSON object per logged step.
        progress: told after every step.
    """

    stage: int
    loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole accumulated batch

    def __init__(
        self,
        decoder: PreTrainedModel,
        args: TrainingArguments,
        blocks: Any,
        teacher: PreTrainedModel | None,
        journal: Path,
        progress: Progress,
    ) -> None:
        self.decoder = decoder  # the Trainer's own reference becomes the wrapper under FSDP
        super().__init__(model=decoder, args=args, train_dataset=blocks, data_collator=collate)
        self.remove_callback(PrinterCallback)  # prints to stdout, which belongs to the command line
        self.add_callback(_StepEnd(self, progress))
        self.teacher, self.journal = teacher, journal
        self.step_loss: Any = 0.0
        self.seconds_before, self.tokens_before, self.started = 0.0, 0, time.monotonic()

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Mean loss per item of one forward."""
        raise NotImplementedError

    def num_items(self, inputs: dict[str, Tensor]) -> Tensor:
        """How many items `batch_loss` averages over."""
        raise NotImplementedError

    def resume(self, checkpoint: Path | None) -> None:
        """Train to the end, from the start or from a complete checkpoint."""
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if self.is_world_process_zero():
            trim_journal(self.journal, step)
        rows = read_journal(self.journal)
        if rows:
            self.seconds_before, self.tokens_before = rows[-1]["seconds"], rows[-1]["tokens"]
        self.started = time.monotonic()
        if checkpoint is not None and step >= self.args.max_steps:
            self._load_from_checkpoint(str(checkpoint), self.decoder)  # upstream would train one step more
            return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def tokens_per_second(self) -> float:
        """Of this process's run, over all devices."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return (self.state.num_input_tokens_seen - self.tokens_before) / elapsed

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Upstream's batches, with our own count of items over all devices (upstream counts shifted
        labels)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = (
            torch.stack([self.num_items(batch) for batch in batches]).sum().to(device) if batches else None
        )
        if count is not None and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """The teacher and the loss run in the model's precision, too: accelerate casts the model's forward alone."""
        return self.accelerator.autocast()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This forward's share of the mean over the accumulated batch."""
        share = self.num_items(inputs) / num_items_in_batch
        loss = self.batch_loss(model, inputs) * share
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Upstream's step, its loss added to the optimiser step's."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss  # a tensor: reading it would wait for the device
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Upstream's norm, taken right before the optimiser's step; stops where it or the step's loss is not finite.

        The one place in a step that waits for the device.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.step_loss = float(self.step_loss)
        self._stop_unless_finite("loss", self.step_loss)
        norm = float(norm)
        self._stop_unless_finite("gradient norm", norm)
        return norm

    def _stop_unless_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._stop(self.state.global_step + 1, f"the {what} is {value}")

    def _stop(self, step: int, reason: str) -> None:
        """End the run at a step, naming the checkpoint to go on from."""
        kept = last_complete_checkpoint(self.journal.parent, self.args.world_size)
        rate = f"stage{self.stage}.learning_rate={self.args.learning_rate:g}"
        raise ValueError(
            f"stage {self.stage} stopped at step {step} of {self.state.max_steps} because {reason}; the last good "
            f"checkpoint is {kept or 'the start (none was written yet)'}; try a lower rate than {rate}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append a line to the journal (upstream would grow every checkpoint's state by it)."""
        if "loss" not in logs:
            return
        row = {
            "stage": self.stage,
            "step": self.state.global_step,
            "tokens": int(self.state.num_input_tokens_seen),
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 3),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(self.tokens_per_second(), 1),
            **self.extra_metrics(),
        }
        if self.is_world_process_zero():
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def extra_metrics(self) -> dict[str, Any]:
        """What a stage adds to a journal line, averaged since the last one."""
        return {}

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Processes hold batches of one size, so nothing has to be gathered and read from the device for it."""
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: upstream walks over all parameters at every forward for it."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the trained tensors only: the frozen ones are the source checkpoint's."""
        if not self.args.should_save:
            return
        directory = Path(output_dir) if output_dir else self.journal.parent
        directory.mkdir(parents=True, exist_ok=True)
        trained = trainable_state(self.decoder)
        if state_dict is not None:
            trained = {name: state_dict[name] for name in trained}
        save_file({name: tensor.cpu() for name, tensor in trained.items()}, directory / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trainable(Path(resume_from_checkpoint) / WEIGHTS, self.decoder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Upstream's checkpoint; none of tensors that are not finite, and a failed write leaves nothing behind."""
        for name, parameter in self.decoder.named_parameters():
            if parameter.requires_grad and not parameter.detach().isfinite().all():
                self._stop(self.state.global_step, f"{name} is no longer finite")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            path = self.journal.parent / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(path, ignore_errors=True)
            full = any(sign in str(error) for sign in _DISK_SIGNS)
            reason = "the disk is full" if full else str(error).splitlines()[0]
            raise OSError(
                f"cannot write {path}: {reason}; free some disk space and run the same again"
            ) from error


class _StepEnd(TrainerCallback):
    """Tells the caller about every step, and has the last step logged."""

    def __init__(self, trainer: StageTrainer, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        if state.global_step >= state.max_steps:
            control.should_log = True
        if state.is_world_process_zero:
            stage, speed = self.trainer.stage, self.trainer.tokens_per_second()
            self.progress.report(
                f"stage {'I' * stage}",
                state.global_step,
                state.max_steps,
                f"{speed:,.0f} tokens/s, loss {loss:.4f}",
                stage=stage,
                tokens_per_second=speed,
                loss=loss,
            )
        return control
