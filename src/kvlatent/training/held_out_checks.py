"""Checks of a stage on held-out blocks: it stops when they say that nothing is gained, and its best weights are kept.

The start is checked, too, so a stage that only makes things worse gives back what it was given. The checks and the best
weights lie in the stage's directory: a run that was killed goes on from its checkpoint as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from kvlatent.jobs.atomic import write_atomically, write_text
from kvlatent.jobs.devices import precision
from kvlatent.jobs.recipe import Stage2
from kvlatent.model.head import Head
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.training.loop import collate
from kvlatent.training.resume import load_trainable, read_journal
from kvlatent.training.trainable import trainable_state

__all__ = ["CHECKS", "BestKept", "Divergence"]

CHECKS = 16
"""In a whole stage, beside that of the start."""

_PATIENCE = 4  # checks without a new least


class Divergence:
    """KL(original || model) of the next token on some blocks, in nats a token; the original's part is computed once.

    Args:
        model, original: causal language models on one device.
        blocks: rows of `input_ids` and `position_ids` [T]; batch_size: blocks at once.
        dtype: of the products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        blocks: Any,
        *,
        batch_size: int,
        dtype: str,
    ) -> None:
        self.model, self.original, self.dtype = model, original, dtype
        rows = [blocks[index] for index in range(len(blocks))]
        self.batches = [
            {name: tensor.to(model.device) for name, tensor in collate(rows[i : i + batch_size]).items()}
            for i in range(0, len(rows), batch_size)
        ]
        self.wanted: list[Tensor] = []

    @torch.no_grad()
    def __call__(self) -> float:
        """Of the model as it is now."""
        total = tokens = 0.0
        heads = Head.of_model(self.model), Head.of_model(self.original)
        if not self.wanted:
            self.wanted = [self._states(self.original, batch) for batch in self.batches]
        with _evaluating(self.model.get_decoder()):
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                states = self._states(self.model, batch)
                with precision(self.model.device, self.dtype):
                    goal = Stage2(objective="kl")
                    loss = stage2_loss(states, heads[0], batch["input_ids"], goal, wanted, heads[1])
                total += float(loss) * states.shape[0]
                tokens += states.shape[0]
        return total / tokens

    def _states(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        call = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        with precision(model.device, self.dtype):
            return model.get_decoder()(**call, use_cache=False).last_hidden_state


@contextmanager
def _evaluating(module: Any) -> Generator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class BestKept(TrainerCallback):
    """Checks every so many steps, and keeps the weights of the least divergence.

    Args:
        divergence: of the model as it is.
        decoder: whose trained tensors are kept.
        directory: of the stage.
    """

    def __init__(self, divergence: Callable[[], float], decoder: PreTrainedModel, directory: Path) -> None:
        self.divergence, self.decoder = divergence, decoder
        self.file, self.journal = directory / "best.safetensors", directory / "checks.jsonl"
        self.rows = read_journal(self.journal)

    @property
    def best(self) -> dict[str, Any]:
        """The check of the least divergence, the first of equals."""
        return min(self.rows, key=lambda row: row["divergence"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the start, or forget what comes behind the checkpoint, which will come again."""
        self.rows = [row for row in self.rows if row["step"] <= state.global_step]
        if not self.rows:
            self._check(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Check where it is time to."""
        step, every = state.global_step, math.ceil(state.max_steps / CHECKS)
        if step % every == 0 or step >= state.max_steps:
            self._check(step)
            since = [row for row in self.rows if row["step"] > self.best["step"]]
            if len(since) >= _PATIENCE:
                control.should_training_stop = control.should_log = True
        return control

    def put_back(self) -> dict[str, Any]:
        """Give the decoder the best weights; returns "checks" and, of the kept one, "kept_step"."""
        load_trainable(self.file, self.decoder)
        return {"checks": self.rows, "kept_step": self.best["step"]}

    def _check(self, step: int) -> None:
        self.rows.append({"step": step, "divergence": self.divergence()})
        if self.best["step"] == step:
            tensors = {name: tensor.cpu() for name, tensor in trainable_state(self.decoder).items()}
            write_atomically(self.file, lambda file: save_file(tensors, file))
        write_text(self.journal, "".join(json.dumps(row) + "\n" for row in self.rows))
