"""Stage II losses: predict the next token, or the original model's distribution over it (paper 3.2.3), or both.

The paper's equations 8 and 9 need the logits of every position. A batch of them is the largest tensor of
a training step, so both losses take the decoder's output and the language-model head, and compute logits
for as many tokens at a time as memory is meant for. The head is frozen and the loss a mean, so the gradient of a chunk
is known together with its loss: nothing of it is kept for the backward pass, and nothing computed there again.

B batch, T positions, N tokens, D model width, V vocabulary. Labels are shifted: `labels[b, t]` is the token to
predict at position t, or -100 where there is none; such positions cost nothing, in either loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlatent.jobs.recipe import Stage, Stage2
from kvlatent.model.divergences import TopTokens, divergence
from kvlatent.model.head import IGNORED, Head, tokens_of_logits

__all__ = ["needs_teacher", "stage2_loss"]


def needs_teacher(settings: Stage) -> bool:
    """Whether the stage's loss looks at the original."""
    return not (isinstance(settings, Stage2) and settings.objective == "next_token")


def stage2_loss(
    hidden: Float[Tensor, "B T D"],
    head: nn.Module | Head | Tensor | tuple[Tensor, Tensor | None],
    labels: Int[Tensor, "B T"],
    settings: Stage2,
    teacher_hidden: Float[Tensor, "B T D_teacher"] | None = None,
    teacher_head: nn.Module | Head | Tensor | tuple[Tensor, Tensor | None] | None = None,
    *,
    stored: TopTokens | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, ""]:
    """Mean loss in nats per token that counts, fp32; 0 where none does. It can be differentiated once, by `hidden`.

    Of the objective: "next_token" is the cross-entropy (equation 8); "kl" is KL(original || student) x temperature^2
    (equation 9), both distributions softened by the temperature, whose square keeps the gradient's size; "reverse_kl" is
    KL(student || original) x temperature^2; "mixed_kl" is `reverse_weight` x reverse + (1 - `reverse_weight`) x forward;
    "mix" is `kl_weight` x KL + (1 - `kl_weight`) x cross-entropy. Each takes one pass over the logits.

    Args:
        hidden, head: of the student; the head is frozen.
        labels: of a divergence alone they only say which positions count.
        settings: `objective`, its weights and `temperature` are read.
        teacher_hidden, teacher_head: of the original, without a graph; "next_token" does without.
        stored: in their place the original's likeliest tokens, [B, T, k] and [B, T, k + 1], of the same temperature.
        chunk_tokens: logits of so many tokens are held at once; None: of as many as `tokens_of_logits` says.

    Raises:
        ValueError: the head requires gradients.
    """
    student = Head.of(head).in_autocast()
    if student.weight.requires_grad:
        raise ValueError(
            "stage II leaves the head as it is and gives it no gradient: got one that requires gradients; call "
            "requires_grad_(False) on it"
        )
    goal_of = _goals(settings, teacher_hidden, teacher_head, stored)
    counted = labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    if counted.numel() == 0:
        return hidden.float().sum() * 0  # a graph for backward() to walk, with zero gradients
    rows, wanted = hidden.flatten(0, 1)[counted], labels.flatten()[counted]
    slopes = torch.empty_like(rows) if rows.requires_grad and torch.is_grad_enabled() else None
    total = hidden.new_zeros((), dtype=torch.float32)
    chunk = chunk_tokens or tokens_of_logits(student)
    with torch.no_grad():
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits = student.logits(rows[part])
            loss, slope = _loss_and_slope(logits, wanted[part], goal_of(counted[part]), settings)
            total += loss
            if slopes is not None:
                slopes[part] = student.pull_back(slope)
        # A number would be multiplied by its inverse.
        count = torch.tensor(len(rows), device=total.device)
        total /= count
    return total if slopes is None else _KnownGradient.apply(rows, total, slopes.div_(count))


class _KnownGradient(torch.autograd.Function):
    """A loss [] with its gradient [N, D] by the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def _goals(
    settings: Stage2, hidden: Tensor | None, head: Any, stored: TopTokens | None
) -> Callable[[Tensor], Tensor | TopTokens | None]:
    """What the original says at positions [N] of the batch: logits [N, V], its likeliest tokens, or nothing."""
    if not _divergence_share(settings):
        return lambda index: None
    if stored is not None:
        ids, log_shares = stored.ids.flatten(0, 1), stored.log_shares.flatten(0, 1)
        return lambda index: TopTokens(ids[index], log_shares[index])
    assert hidden is not None and head is not None
    teacher, states = Head.of(head).in_autocast(), hidden.flatten(0, 1)
    return lambda index: teacher.logits(states[index])


def _divergence_share(settings: Stage2) -> float:
    """Weight of the divergence; the cross-entropy has the others."""
    return {"next_token": 0.0, "mix": settings.kl_weight}.get(settings.objective, 1.0)


def _loss_and_slope(
    logits: Float[Tensor, "N V"], labels: Tensor, goal: Tensor | TopTokens | None, settings: Stage2
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """Summed loss of a chunk, and its gradient by the logits, in fp32; labels [N]."""
    if goal is None:
        return _cross_entropy(logits, labels)
    share = _divergence_share(settings)
    reverse_share = {"reverse_kl": 1.0, "mixed_kl": settings.reverse_weight}.get(settings.objective, 0.0)
    loss, slope = divergence(logits, goal, settings.temperature, reverse_share)
    if share == 1:
        return loss, slope
    next_token, other = _cross_entropy(logits, labels)
    return share * loss + (1 - share) * next_token, slope.mul_(share).add_(other, alpha=1 - share)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    predicted = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(predicted, labels, reduction="sum")
    slope = predicted.exp_()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1
    return loss, slope
