"""The training loop of both stages, a `transformers.Trainer`: one loop from one CPU to many GPUs.

What differs from the stock loop and its arguments, and why: the loss is a mean per token over the whole accumulated
batch; a loss or gradient that is not finite ends the run before the optimiser sees it; checkpoints hold the trained
tensors only; metrics go to a journal file instead of every checkpoint's state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kvlatent.jobs.processes import is_spread, join_processes
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe, Stage
from kvlatent.training.callbacks import SPIKE_STEPS, LossSpikes, StepEnd, Terminated, Termination
from kvlatent.training.checkpointing import CheckpointTrainer
from kvlatent.training.resume import read_journal, trim_journal
from kvlatent.training.sharding import check_scale, use_fsdp2

__all__ = ["StageTrainer", "collate", "training_arguments"]


def training_arguments(
    settings: Stage, recipe: Recipe, stage: int, block_size: int, work_dir: Path, device: str
) -> TrainingArguments:
    """Upstream's arguments for one stage; `settings.tokens` is rounded up to whole optimiser steps.

    Raises:
        ValueError: the processes do not divide the batch, or cannot be used as the recipe says.
    """
    processes = join_processes(device)
    check_scale(recipe.scale, device, is_spread=is_spread())
    if settings.batch_size % processes:
        raise ValueError(
            f"the number of processes must divide the batch: got stage{stage}.batch_size={settings.batch_size} and "
            f"{processes} processes; try --set stage{stage}.batch_size={-(-settings.batch_size // processes) * processes}"
        )
    args = TrainingArguments(
        output_dir=str(work_dir),
        seed=recipe.seed + stage,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=device == "cpu",
        per_device_train_batch_size=settings.batch_size // processes,
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
        report_to=list(recipe.report_to) or "none",
        fsdp=recipe.scale.sharding == "fsdp2",  # ty: ignore[invalid-argument-type] - upstream's own spelling
        deepspeed=recipe.scale.deepspeed,
        max_steps=1,
    )
    if args.n_gpu > 1:
        args._n_gpu = (
            1  # one process uses one GPU; several go through torchrun (DataParallel breaks the hooks)
        )
    per_step = settings.batch_size * settings.gradient_accumulation * block_size
    args.max_steps = math.ceil(settings.tokens / per_step)
    args.warmup_steps = math.ceil(settings.warmup_ratio * args.max_steps)
    return args


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of equal length to a batch of tensors [B, T, ...]: int64, but for shares, which stay as they are."""
    return {key: torch.stack([_whole_numbers(row[key]) for row in rows]) for key in rows[0]}


def _whole_numbers(column: Any) -> Tensor:
    tensor = torch.as_tensor(column)
    return tensor if tensor.is_floating_point() else tensor.long()


class StageTrainer(CheckpointTrainer):
    """What both stages share; a stage defines `batch_loss` and `num_items`.

    Args:
        decoder: the prepared latent decoder.
        args: from `training_arguments`.
        blocks: rows with `input_ids`, `position_ids`, `labels` of one length.
        teacher: the original's causal language model on the same device, frozen, or None.
        journal: the metrics file, one JSON object per logged step.
        progress: told after every step.
        spike_factor: see `LossSpikes`.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole accumulated batch

    def __init__(
        self,
        decoder: PreTrainedModel,
        args: TrainingArguments,
        blocks: Any,
        teacher: PreTrainedModel | None,
        journal: Path,
        progress: Progress,
        spike_factor: float = 0.0,
    ) -> None:
        self.decoder = decoder  # the Trainer's own reference becomes the wrapper under DDP
        super().__init__(model=decoder, args=args, train_dataset=blocks, data_collator=collate)
        self.remove_callback(PrinterCallback)  # prints to stdout, which belongs to the command line
        self.termination = Termination()
        self.add_callback(StepEnd(self, progress))
        self.add_callback(self.termination)
        self.spikes = LossSpikes(spike_factor, [])
        self.teacher, self.journal = teacher, journal
        self.step_loss: Any = 0.0
        self.seconds_before, self.tokens_before, self.started = 0.0, 0, time.monotonic()

    def create_accelerator_and_postprocess(self) -> None:
        """Upstream's accelerator, sharding as is settled here."""
        super().create_accelerator_and_postprocess()
        dtype = "bfloat16" if self.args.bf16 else "float32"
        self.is_fsdp_enabled = use_fsdp2(self.accelerator, self.args.fsdp_plugin_args, dtype)

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Mean loss per item of one forward."""
        raise NotImplementedError

    def num_items(self, inputs: dict[str, Tensor]) -> Tensor:
        """How many items `batch_loss` averages over."""
        raise NotImplementedError

    def resume(self, checkpoint: Path | None) -> None:
        """Train to the end, from the start or from a complete checkpoint.

        Raises:
            Terminated: SIGTERM came; the state is saved.
        """
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if self.is_world_process_zero():
            trim_journal(self.journal, step)
        self.accelerator.wait_for_everyone()
        rows = read_journal(self.journal)
        if rows:
            self.spikes = LossSpikes(self.spikes.factor, [row["loss"] for row in rows])
            self.seconds_before, self.tokens_before = rows[-1]["seconds"], rows[-1]["tokens"]
        self.started = time.monotonic()
        if checkpoint is not None and step >= self.args.max_steps:
            self._load_from_checkpoint(str(checkpoint), self.decoder)  # upstream would train one step more
            return
        with self.termination.listening():
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if (stopped := self.termination.stopped_at) is not None:
            raise Terminated(
                f"stage {self.stage} was asked to end (SIGTERM) at step {stopped} of {self.state.max_steps}; its state is "
                f"saved in {self.journal.parent / f'checkpoint-{stopped}'}; repeat the same to continue"
            )

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
        asked = torch.full_like(self.step_loss, float(self.termination.asked))
        told = self.accelerator.reduce(torch.stack([self.step_loss, asked]), "mean")  # so all stop, or none
        self.step_loss, asked_share = told.tolist()
        self.termination.is_agreed = asked_share > 0
        self._stop_unless_finite("loss", self.step_loss)
        norm = float(norm)
        self._stop_unless_finite("gradient norm", norm)
        return norm

    def _stop_unless_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._stop(self.state.global_step + 1, f"the {what} is {value}")

    def stop_at_spike(self) -> None:
        """End the run: its loss has run away."""
        seen = self.spikes
        self._stop(
            self.state.global_step,
            f"the loss was above {seen.bound:.4g} for {SPIKE_STEPS} steps in a row, over {seen.factor:g} times its median "
            f"and worse than at the start (now {seen.loss:.4g}; stage{self.stage}.spike_factor=0 would let it go on)",
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
        numbers = {name: value for name, value in row.items() if not isinstance(value, list)}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, numbers)

    def extra_metrics(self) -> dict[str, Any]:
        """What a stage adds to a journal line, averaged since the last one."""
        return {}

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Processes hold batches of one size, so nothing has to be gathered and read from the device for it."""
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: upstream walks over all parameters at every forward for it."""
        return 0
