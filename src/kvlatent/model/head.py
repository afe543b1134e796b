"""The language-model head without a tensor of tokens times vocabulary: logits and losses some tokens at a time.

B batch, T positions, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlatent.model.families import logit_divisor_of

__all__ = ["IGNORED", "Head", "token_losses", "tokens_of_logits"]

IGNORED = -100  # torch's own default for targets that do not count
PROCESSOR_LOGITS_BYTES = 24 << 20


class Head(NamedTuple):
    """A language-model head: logits are `(hidden @ weight.T + bias) / divisor`."""

    weight: Tensor
    bias: Tensor | None = None
    divisor: float = 1.0

    @classmethod
    def of_model(cls, model: Any) -> Head:
        """The head of a causal language model, with what its family divides logits by."""
        return cls.of(model.get_output_embeddings())._replace(divisor=logit_divisor_of(model.config))

    @classmethod
    def of(cls, head: nn.Module | Head | Tensor | tuple[Tensor, Tensor | None]) -> Head:
        """Take weight and bias from a linear layer, a weight, or a pair of both."""
        if isinstance(head, Tensor):
            return cls(head)
        if isinstance(head, tuple):
            return cls(*head)
        linear: Any = head
        return cls(linear.weight, getattr(linear, "bias", None))

    def in_autocast(self) -> Head:
        """The frozen head in autocast's dtype where that is on: autocast would cast the weight at every product."""
        kind = self.weight.device.type
        if self.weight.requires_grad or not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Return fp32 logits; the product runs in the head's dtype, or in autocast's."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return (logits if self.divisor == 1 else logits / self.divisor).float()

    def pull_back(self, slope: Float[Tensor, "N V"]) -> Float[Tensor, "N D"]:
        """Return the gradient by `hidden` of what has the gradient `slope` by the logits."""
        slope = slope if self.divisor == 1 else slope / self.divisor
        return slope.to(self.weight.dtype) @ self.weight


def tokens_of_logits(head: Head) -> int:
    """How many tokens' logits, in fp32, are worth holding at once on the head's device, at least 1.

    A processor is fastest while they stay near its caches, a card while its units are filled: 1/64 of its memory.
    """
    if head.weight.device.type == "cuda":
        budget = torch.cuda.get_device_properties(head.weight.device).total_memory // 64
    else:
        budget = PROCESSOR_LOGITS_BYTES
    return max(1, budget // (head.weight.shape[0] * torch.float32.itemsize))


def token_losses(
    hidden: Float[Tensor, "B T D"],
    head: nn.Module | Head | Tensor | tuple[Tensor, Tensor | None],
    labels: Int[Tensor, "B T"],
    *,
    chunk_tokens: int = 256,
) -> Float[Tensor, "B T"]:
    """Return every position's cross-entropy in nats, fp32, 0 where nothing is to be predicted; no graph."""
    counted = labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    losses = torch.zeros(labels.numel(), dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for index in counted.split(chunk_tokens):
            logits = Head.of(head).logits(hidden.flatten(0, 1)[index])
            losses[index] = F.cross_entropy(logits, labels.flatten()[index], reduction="none")
    return losses.view(labels.shape)
