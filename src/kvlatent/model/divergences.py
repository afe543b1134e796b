"""How far a predicted distribution is from the original's, with the gradient: forward, reverse, or both weighed.

Forward, KL(original || student), asks the student to be wherever the original is; reverse, KL(student || original), not to
be where the original is not. Each is written as loss and gradient at once, since a training step keeps neither logits nor
graph (`logit_loss`). An original that is not in memory is known by its k likeliest tokens and what all others share, one
class more: `TopTokens`. Both divergences of these k + 1 classes are exact; what they cannot see is how the original parts
the rest.

N tokens, V vocabulary, k tokens kept, C classes: V, or k + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["TopTokens", "divergence", "top_tokens"]


class TopTokens(NamedTuple):
    """What is known of a distribution over the vocabulary: `ids` [..., k], and `log_shares` [..., k + 1], the rest last."""

    ids: Tensor
    log_shares: Tensor


def top_tokens(logits: Float[Tensor, "N V"], count: int, temperature: float) -> TopTokens:
    """The likeliest tokens of the softened distribution, in fp32, and in log space what the others share."""
    predicted = F.log_softmax(logits / temperature, dim=-1)
    ids = predicted.topk(count, dim=-1).indices
    return TopTokens(ids, _part_rest(predicted, ids))


def divergence(
    logits: Float[Tensor, "N V"],
    goal: Float[Tensor, "N V"] | TopTokens,
    temperature: float,
    reverse_share: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """The summed divergence x temperature^2, and its gradient by the logits.

    Works in place on tensors of its own: of [N, V] every pass costs.

    Args:
        logits: of the student, not yet softened.
        goal: logits of the original; or its likeliest tokens, softened by the same temperature already.
        reverse_share: weight of the reverse divergence; the forward one has the others.
    """
    predicted = F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
    if isinstance(goal, TopTokens):
        merged = _part_rest(predicted, goal.ids)
        loss, merged_slope = _both(merged.clone(), goal.log_shares.clone(), reverse_share)
        slope = _spread(merged_slope, merged[:, -1:], predicted, goal.ids)
    else:
        expected = F.log_softmax(goal / temperature if temperature != 1 else goal, dim=-1)
        loss, slope = _both(predicted, expected, reverse_share)
    if temperature != 1:
        loss, slope = loss * temperature**2, slope.mul_(temperature)
    return loss, slope


def _both(
    predicted: Float[Tensor, "N C"], expected: Float[Tensor, "N C"], reverse_share: float
) -> tuple[Tensor, Float[Tensor, "N C"]]:
    """The weighed divergence of log-probabilities, which are overwritten."""
    if reverse_share == 0:
        return _forward(predicted, expected)
    if reverse_share == 1:
        return _reverse(predicted, expected)
    forward, slope = _forward(predicted.clone(), expected.clone())
    reverse, other = _reverse(predicted, expected)
    loss = (1 - reverse_share) * forward + reverse_share * reverse
    return loss, slope.mul_(1 - reverse_share).add_(other, alpha=reverse_share)


def _forward(predicted: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    probability = expected.exp()
    loss = expected.sub_(predicted).mul_(probability).sum()
    return loss, predicted.exp_().sub_(probability)


def _reverse(predicted: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    probability = predicted.exp()
    excess = predicted.sub_(expected)
    losses = torch.linalg.vecdot(probability, excess).unsqueeze(-1)
    return losses.sum(), excess.sub_(losses).mul_(probability)


def _part_rest(predicted: Float[Tensor, "N V"], ids: Int[Tensor, "N k"]) -> Float[Tensor, "N C"]:
    """Log-probabilities of the ids and, in the last column, of all other tokens together.

    `predicted` loses those of the ids: -inf stands there. 1 less a sum would be rounding where the rest is small.
    """
    top = predicted.gather(-1, ids)
    rest = predicted.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], dim=-1)


def _spread(
    slope: Float[Tensor, "N C"],
    rest: Float[Tensor, "N 1"],
    predicted: Float[Tensor, "N V"],
    ids: Int[Tensor, "N k"],
) -> Float[Tensor, "N V"]:
    """The gradient by the logits, of one by those of the classes: the rest's is parted as the student parts its own.

    Args:
        rest: log-probability of the rest; predicted: of its tokens, -inf at the ids; overwritten.
    """
    spread = predicted.sub_(rest).exp_().mul_(slope[:, -1:])
    return spread.scatter_(-1, ids, slope[:, :-1])
