"""The two stages as trainers: which loss one forward has, and over how many items it is a mean.

The Trainer's model is the *decoder* in both stages: it holds every trained tensor, and it is called through
its root forward, as DDP and FSDP need. The frozen LM head stays outside and goes to the stage II loss as a
plain weight.

Legend: `B` batch, `T` positions, `L` layers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.jobs.recipe import Stage2
from kvlatent.model.divergences import TopTokens
from kvlatent.model.head import IGNORED, Head
from kvlatent.model.logit_loss import needs_teacher, stage2_loss
from kvlatent.training.layer_loss import capture, layer_losses
from kvlatent.training.loop import StageTrainer
from kvlatent.training.nested_widths import NestedWidths

__all__ = ["EndToEndTrainer", "LayerTrainer"]


class LayerTrainer(StageTrainer):
    """Stage I: the mean over layers of the in-layer squared errors (paper eq. 7)."""

    stage = 1
    layer_total: Any = 0.0
    layer_tokens: int = 0

    def num_items(self, inputs: dict[str, Tensor]) -> Tensor:
        """All tokens: blocks have no padding."""
        return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Mean over layers, tokens and channels."""
        assert self.teacher is not None
        losses = layer_losses(model, capture(self.teacher.get_decoder(), inputs), inputs)
        tokens = inputs["input_ids"].numel()
        self.layer_tokens += tokens
        self.layer_total = self.layer_total + losses.detach() * tokens
        return losses.mean()

    def extra_metrics(self) -> dict[str, Any]:
        """Every layer's own loss: the sum is dominated by the last layers' larger activations."""
        means = self.layer_total / self.layer_tokens
        self.layer_total, self.layer_tokens = 0.0, 0
        return {"layer_losses": self.accelerator.reduce(means, "mean").tolist()}


class EndToEndTrainer(StageTrainer):
    """Stage II: next-token cross-entropy, a divergence from the original, or a mix (paper eq. 8 and 9).

    Where the blocks come with the original's likeliest tokens, there is no teacher beside them.

    Args:
        head: the latent model's LM head, frozen, on the same device.
        settings: objective, weights and temperature.
        nested: the widths to train, one a step, or None for the model's own.
        others: as for `StageTrainer`.
    """

    stage = 2

    def __init__(
        self, *args: Any, head: Head, settings: Stage2, nested: NestedWidths | None = None, **others: Any
    ) -> None:
        super().__init__(*args, **others)
        self.head, self.settings, self.nested = head, settings, nested

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """As in all stages, at the width of this optimiser step; its backward, too, which may run forwards again."""
        narrowed = nullcontext() if self.nested is None else self.nested.narrowed(self.state.global_step)
        with narrowed:
            return super().training_step(model, inputs, num_items_in_batch)

    def num_items(self, inputs: dict[str, Tensor]) -> Tensor:
        """Positions with a label."""
        return inputs["labels"].ne(IGNORED).sum()

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Mean over the labelled tokens."""
        call = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs}
        hidden = model(**call, use_cache=False).last_hidden_state
        teacher: list[Any] = []
        stored = None
        if "teacher_ids" in inputs:
            stored = TopTokens(inputs["teacher_ids"], inputs["teacher_log_shares"])
        elif needs_teacher(self.settings):
            assert self.teacher is not None
            with torch.no_grad():
                output = self.teacher.get_decoder()(**call, use_cache=False)
            teacher = [output.last_hidden_state, Head.of_model(self.teacher)]
        return stage2_loss(hidden, self.head, inputs["labels"], self.settings, *teacher, stored=stored)
