"""Stage II losses: predict the next token, or the original model's distribution over it (paper 3.2.3).

The paper's equations 8 and 9 need the logits of every position. A batch of them is the largest tensor of
a training step, so both losses take the decoder's output and the language-model head, and compute logits
for a few hundred tokens at a time; the backward pass computes them again.

B batch, T positions, D model width, V vocabulary. Labels are shifted: `labels[b, t]` is the token to
predict at position t, or -100 where there is none; such positions cost nothing, in either loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvlatent.jobs.recipe import Stage, Stage2
from kvlatent.model.head import IGNORED, Head

__all__ = ["needs_teacher", "stage2_loss"]


def needs_teacher(settings: Stage) -> bool:
    """Whether the stage's loss looks at the original."""
    return not (isinstance(settings, Stage2) and settings.objective == "next_token")


def stage2_loss(
    hidden: Float[Tensor, "B T D"],
    head: nn.Module | Tensor | tuple[Tensor, Tensor | None],
    labels: Int[Tensor, "B T"],
    settings: Stage2,
    teacher_hidden: Float[Tensor, "B T D_teacher"] | None = None,
    teacher_head: nn.Module | Tensor | tuple[Tensor, Tensor | None] | None = None,
    *,
    chunk_tokens: int = 256,
) -> Float[Tensor, ""]:
    """Mean loss in nats per token that counts, fp32; 0 where none does.

    Of the objective: "next_token" is the cross-entropy (equation 8); "kl" is KL(original || student) x temperature^2
    (equation 9), both distributions softened by the temperature, whose square keeps the gradient's size; "mix" is
    `kl_weight` x KL + (1 - `kl_weight`) x cross-entropy, from one pass over the logits.

    Args:
        hidden, head: of the student.
        labels: of "kl" alone they only say which positions count.
        settings: `objective`, `kl_weight` and `temperature` are read.
        teacher_hidden, teacher_head: of the original, without a graph; "next_token" does without.
        chunk_tokens: logits of so many tokens are held at once.
    """
    share = {"next_token": 0.0, "kl": 1.0, "mix": settings.kl_weight}[settings.objective]
    student, teacher, goals = Head.of(head), None, None
    if share:
        assert teacher_hidden is not None and teacher_head is not None
        teacher, goals = Head.of(teacher_head), teacher_hidden.flatten(0, 1)
    weights = (1 - share, share, settings.temperature)
    counted = labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    if counted.numel() == 0:
        return hidden.float().sum() * 0  # a graph for backward() to walk, with zero gradients
    total = hidden.new_zeros((), dtype=torch.float32)
    for index in counted.split(chunk_tokens):
        goal = None if goals is None else goals[index]
        inputs = (hidden.flatten(0, 1)[index], student, labels.flatten()[index], goal, teacher, weights)
        if torch.is_grad_enabled():
            # The logits are dropped after the forward pass; nothing random happens in between.
            total = total + checkpoint(_chunk_loss, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _chunk_loss(*inputs)
    return total / torch.tensor(
        counted.numel(), device=total.device
    )  # a number would be multiplied by its inverse


def _chunk_loss(
    rows: Tensor,
    head: Head,
    labels: Tensor,
    goal: Tensor | None,
    teacher: Head | None,
    weights: tuple[float, float, float],
) -> Tensor:
    next_token, divergence, temperature = weights
    logits = head.logits(rows)
    loss = logits.new_zeros(())
    if next_token:
        loss = loss + next_token * F.cross_entropy(logits, labels, reduction="sum")
    if divergence and goal is not None and teacher is not None:
        with torch.no_grad():
            expected = F.log_softmax(teacher.logits(goal) / temperature, dim=-1)
        predicted = F.log_softmax(logits / temperature, dim=-1)
        kl = F.kl_div(predicted, expected, reduction="sum", log_target=True)
        loss = loss + divergence * temperature**2 * kl
    return loss
