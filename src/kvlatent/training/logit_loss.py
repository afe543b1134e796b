"""Stage II losses: predict the next token, or the original model's distribution over it (paper 3.2.3).

The paper's equations 8 and 9 need the logits of every position. A batch of them is the largest tensor of
a training step, so both losses take the decoder's output and the language-model head, and compute logits
for a few hundred tokens at a time; the backward pass computes them again.

B batch, T positions, D model width, V vocabulary. Labels are shifted: `labels[b, t]` is the token to
predict at position t, or -100 where there is none; such positions cost nothing, in either loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvlatent.model.head import IGNORED, Head

Objective = Literal["next_token", "kl", "mix"]
OBJECTIVES: tuple[str, ...] = ("next_token", "kl", "mix")


def next_token_loss(
    hidden: Float[Tensor, "B T D"],
    head: nn.Module | Tensor | tuple[Tensor, Tensor | None],
    labels: Int[Tensor, "B T"],
    *,
    chunk_tokens: int = 256,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the summed cross-entropy in nats (equation 8), fp32, and the number of tokens in the sum."""
    return _summed(hidden, Head.of(head), labels, None, None, (1.0, 0.0, 1.0), chunk_tokens)


def kl_loss(
    student_hidden: Float[Tensor, "B T D"],
    student_head: nn.Module | Tensor | tuple[Tensor, Tensor | None],
    teacher_hidden: Float[Tensor, "B T D_teacher"],
    teacher_head: nn.Module | Tensor | tuple[Tensor, Tensor | None],
    labels: Int[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the summed KL(original || student) x temperature^2 in nats (equation 9), and the tokens.

    Both distributions are softened by `temperature`; its square keeps the gradient's size. Labels only say
    which positions count. The teacher's hidden states must come without a graph.

    Raises:
        ValueError: the two heads predict vocabularies of different size.
    """
    weights = (0.0, 1.0, temperature)
    return _summed(
        student_hidden,
        Head.of(student_head),
        labels,
        teacher_hidden,
        Head.of(teacher_head),
        weights,
        chunk_tokens,
    )


def stage2_loss(
    hidden: Float[Tensor, "B T D"],
    head_weight: Float[Tensor, "V D"],
    head_bias: Float[Tensor, " V"] | None,
    batch: Mapping[str, Tensor],
    *,
    objective: Objective,
    kl_weight: float = 0.5,
    temperature: float = 1.0,
    teacher_hidden: Float[Tensor, "B T D_teacher"] | None = None,
    teacher_head: nn.Module | Tensor | tuple[Tensor, Tensor | None] | None = None,
    chunk_tokens: int = 256,
) -> Float[Tensor, ""]:
    """Return the mean loss per token that counts in `batch["labels"]`; 0 where none does.

    `mix` is `kl_weight` x KL + (1 - `kl_weight`) x cross-entropy, from one pass over the logits.

    Raises:
        ValueError: an unknown objective, a weight outside [0, 1], a temperature that is not positive, or a
            divergence without the original's hidden states and head.
    """
    shares = {"next_token": 0.0, "kl": 1.0, "mix": kl_weight}
    if objective not in shares:
        raise ValueError(f"the objective must be one of {', '.join(OBJECTIVES)}: got {objective!r}")
    share = shares[objective]
    if not 0 <= share <= 1:
        raise ValueError(f"kl_weight is a share between 0 and 1: got {kl_weight}; try 0.5")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0: got {temperature}; try 1.0")
    if share == 0:
        teacher_hidden, teacher = None, None
    elif teacher_hidden is None or teacher_head is None:
        raise ValueError(
            f"the objective {objective!r} needs the original model's hidden states and head: got none"
        )
    else:
        teacher = Head.of(teacher_head)
    total, count = _summed(
        hidden,
        Head(head_weight, head_bias),
        batch["labels"],
        teacher_hidden,
        teacher,
        (1 - share, share, temperature),
        chunk_tokens,
    )
    return total / count.clamp(min=1)


def _summed(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    weights: tuple[float, float, float],
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Add up the losses of the positions that count, `chunk_tokens` at a time."""
    if teacher is not None and teacher.weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"teacher and student must predict the same vocabulary: got {teacher.weight.shape[0]} and "
            f"{head.weight.shape[0]} tokens; use the model that the student was converted from"
        )
    counted = labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    total = hidden.new_zeros((), dtype=torch.float32)
    if counted.numel() == 0:
        total = total + hidden.float().sum() * 0  # a graph for backward() to walk, with zero gradients
    for index in counted.split(chunk_tokens) if counted.numel() else ():
        rows = hidden.flatten(0, 1)[index]
        goal = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)[index]
        inputs = (rows, head, labels.flatten()[index], goal, teacher, weights)
        if torch.is_grad_enabled():
            # The logits are dropped after the forward pass; nothing random happens in between.
            total = total + checkpoint(_chunk_loss, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _chunk_loss(*inputs)
    return total, torch.tensor(counted.numel(), device=hidden.device)


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
