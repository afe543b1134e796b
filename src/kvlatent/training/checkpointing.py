"""What a stage's checkpoints hold and how they come back: the trained tensors whole, and the optimiser, sharded or not.

The frozen weights are the source checkpoint's. A failed write leaves nothing behind, and tensors that are not finite are not
written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from kvlatent.jobs.processes import any_process
from kvlatent.training.resume import (
    OPTIMIZER,
    SCHEDULER,
    WEIGHTS,
    check_names,
    last_complete_checkpoint,
    load_trainable,
)
from kvlatent.training.sharding import (
    load_optimizer,
    local_part,
    optimizer_state,
    put_trained,
    trained_tensors,
)

__all__ = ["CheckpointTrainer"]

_DISK_SIGNS = (
    "No space left",
    "File too large",
    "inline_container",
    "unexpected pos",
)  # torch names no cause


class CheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are those of a stage; who derives from it sets `stage`, `decoder` and `journal`."""

    stage: int
    decoder: PreTrainedModel
    journal: Path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Upstream's, but for shards, of which it would gather the frozen ones as well."""
        if self.is_fsdp_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the trained tensors only, whole: the frozen ones are the source checkpoint's."""
        trained = trained_tensors(self.decoder, keep=self.args.should_save)
        if not self.args.should_save:
            return
        directory = Path(output_dir) if output_dir else self.journal.parent
        directory.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:
            trained = {name: state_dict[name].cpu() for name in trained}
        save_file(trained, directory / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / WEIGHTS
        if self.is_fsdp_enabled:
            check_names(file, self.decoder)
            put_trained(load_file(file), self.decoder)
        else:
            load_trainable(file, self.decoder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Upstream's; of shards the whole state, in the file of a run without any."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = optimizer_state(self.decoder, optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Upstream's; the rates are those of the arguments, which may be others than when the checkpoint was written."""
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        fresh = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        if self.is_fsdp_enabled:
            load_optimizer(Path(checkpoint) / OPTIMIZER, self.decoder, optimizer.optimizer)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler.base_lrs = [group["initial_lr"] for group in fresh]
        for group, own, share in zip(optimizer.param_groups, fresh, scheduler.lr_lambdas, strict=True):
            group.update({**own, "lr": own["initial_lr"] * share(scheduler.last_epoch)})
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Upstream's checkpoint; none of tensors that are not finite, and a failed write leaves nothing behind."""
        broken = (
            name
            for name, parameter in self.decoder.named_parameters()
            if parameter.requires_grad and not local_part(parameter).isfinite().all()
        )
        if any_process((name := next(broken, None)) is not None):
            self._stop(self.state.global_step, f"{name or 'a shard of another process'} is no longer finite")
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

    def _stop(self, step: int, reason: str) -> None:
        """End the run at a step, naming the checkpoint to go on from."""
        kept = last_complete_checkpoint(self.journal.parent, self.args.world_size)
        rate = f"stage{self.stage}.learning_rate={self.args.learning_rate:g}"
        raise ValueError(
            f"stage {self.stage} stopped at step {step} of {self.state.max_steps} because {reason}; the last good "
            f"checkpoint is {kept or 'the start (none was written yet)'}; try a lower rate than {rate}"
        )
