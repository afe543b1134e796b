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

from kvlatent.jobs.recipe import Stage1, Stage2
from kvlatent.model.divergences import TopTokens
from kvlatent.model.head import IGNORED, Head
from kvlatent.model.logit_loss import needs_teacher, stage2_loss
from kvlatent.training.layer_loss import capture, layer_losses, layer_losses_one_at_a_time, layers_of
from kvlatent.training.loop import StageTrainer
from kvlatent.training.nested_widths import NestedWidths

__all__ = ["EndToEndTrainer", "LayerTrainer", "first_own_step"]


class LayerTrainer(StageTrainer):
    """Stage I: the mean over layers of the in-layer squared errors (paper eq. 7).

    Layers are problems of their own, so their gradients are clipped one by one: what one layer learns depends on no other,
    and a stage that holds one layer at a time has the same result.

    Args:
        settings: `own_stream` is read.
        others: as for `StageTrainer`.
    """

    stage = 1
    layer_total: Any = 0.0
    layer_tokens: int = 0

    def __init__(self, *args: Any, settings: Stage1, **others: Any) -> None:
        super().__init__(*args, **others)
        self.settings = settings
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not self.is_sharded:
            self.args.activation_checkpointing = (
                False  # one layer's graph is alive: recomputing it saves nothing
            )

    def num_items(self, inputs: dict[str, Tensor]) -> Tensor:
        """All tokens: blocks have no padding."""
        return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)

    def batch_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Mean over layers, tokens and channels."""
        losses = self.losses_of_layers(model, inputs)
        tokens = inputs["input_ids"].numel()
        self.layer_tokens += tokens
        self.layer_total = self.layer_total + losses.detach() * tokens
        return losses.mean()

    def losses_of_layers(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """[L], of the layers that are trained."""
        assert self.teacher is not None
        teacher, own = self.teacher.get_decoder(), self.feeds_own_stream()
        if self.is_sharded:
            return layer_losses(model, capture(teacher, inputs), inputs, own_stream=own)
        return layer_losses_one_at_a_time(model, teacher, inputs, own_stream=own)

    def feeds_own_stream(self) -> bool:
        """Whether the step under way is one of the last, in which layers see the student's own stream."""
        return self.state.global_step >= first_own_step(self.settings, self.args.max_steps)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip each layer's gradients to the norm; returns that of all of them before."""
        if self.is_sharded and not self.accelerator.is_fsdp2:
            return super()._clip_grad_norm(model)  # DeepSpeed and FSDP 1 know the norm of the whole alone
        norms = []
        for layer in layers_of(model):
            trained = [parameter for parameter in layer.parameters() if parameter.grad is not None]
            if trained:
                norms.append(self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm))
        return torch.stack(norms).square().sum().sqrt()

    def extra_metrics(self) -> dict[str, Any]:
        """Every layer's own loss: the sum is dominated by the last layers' larger activations."""
        means = self.layer_total / self.layer_tokens
        self.layer_total, self.layer_tokens = 0.0, 0
        return {"layer_losses": self.accelerator.reduce(means, "mean").tolist()}


def first_own_step(settings: Stage1, steps: int) -> int:
    """The first of so many steps, from 0, in which layers see the student's own stream; `steps` where there is none."""
    return steps - round(settings.own_stream * steps)


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
