"""Perplexity of a causal language model on blocks, with a standard error that knows tokens come in blocks.

Tokens of one block share their text, so their losses are not independent; blocks nearly are. The error is
therefore that of a ratio estimator (sum of losses over sum of tokens) with blocks as the sampling unit.
Two models are compared on the same blocks, pair by pair: most of the spread is the text's, and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvlatent.evaluation.sequences import counter, evaluation_mode
from kvlatent.model.head import IGNORED, Head, token_losses

_LARGEST_LOSS = 700.0  # exp() of more is no longer a finite double


class Rows(NamedTuple):
    """Sequences that are read together, int64 [B, T] each.

    Args:
        input_ids: padded on the right, where no token looks.
        labels: the token that each position should predict, `IGNORED` where none counts.
        position_ids: None counts from 0; positions that restart separate documents.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Perplexity:
    """What was measured: `loss` in nats per token, its exponential, and the latter's standard error.

    The standard error is None for a single block. `block_losses` (summed nats) and `block_tokens` keep
    what a paired comparison needs.
    """

    loss: float
    perplexity: float
    standard_error: float | None
    tokens: int
    block_losses: tuple[float, ...]
    block_tokens: tuple[int, ...]

    def figures(self) -> dict[str, Any]:
        """What documents hold of it."""
        names = ("perplexity", "standard_error", "loss", "tokens")
        return {name: getattr(self, name) for name in names}


def perplexity(
    model: PreTrainedModel,
    blocks: Any,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure a model on blocks from :mod:`kvlatent.text`, every token weighing the same.

    `progress` is called with the blocks done and their number.

    Raises:
        ValueError: no blocks, nothing to predict in them, or a loss that is NaN, infinite or above 700.
    """
    if batch_size < 1:
        raise ValueError(f"a batch holds at least one block: got batch_size={batch_size}; try 8")
    counts: list[int] = []

    def batches() -> Iterator[Rows]:
        for first in range(0, len(blocks), batch_size):
            columns = blocks[first : first + batch_size]
            rows = Rows(*(torch.as_tensor(columns[name]) for name in Rows._fields))
            counts.extend(rows.labels.ne(IGNORED).sum(dim=1).tolist())
            yield rows

    advance = counter(progress, len(blocks))
    losses = score_rows(model, batches(), lambda rows: advance(len(rows.labels)))
    return summarise([total for part in losses for total in part.double().sum(dim=1).tolist()], counts)


def score_rows(
    model: PreTrainedModel, batches: Iterable[Rows], advance: Callable[[Rows], None]
) -> list[torch.Tensor]:
    """Nats of every token of each batch, fp32 [B, T] on the CPU, 0 where nothing is predicted: every perplexity's source.

    The model runs in evaluation mode, in its own dtype and on its own device; no logits of a whole batch are ever held.
    `advance` is called with each batch when it is done.
    """
    decoder, losses = model.get_decoder(), []
    with evaluation_mode(model):
        for rows in batches:
            ids, labels = rows.input_ids.to(model.device), rows.labels.to(model.device)
            positions = None if rows.position_ids is None else rows.position_ids.to(model.device)
            output = decoder(input_ids=ids, position_ids=positions, use_cache=False)
            losses.append(token_losses(output.last_hidden_state, Head.of_model(model), labels).cpu())
            advance(rows)
    return losses


def summarise(block_losses: Sequence[float], block_tokens: Sequence[int]) -> Perplexity:
    """Turn the summed loss and the token count of every block into a :class:`Perplexity`.

    Raises:
        ValueError: there is no token, or the loss is NaN, infinite or above 700.
    """
    tokens = sum(block_tokens)
    if tokens == 0:
        raise ValueError(
            f"perplexity needs tokens to predict: {len(block_tokens)} blocks hold 0; give more text"
        )
    loss = math.fsum(block_losses) / tokens
    if not loss < _LARGEST_LOSS:
        raise ValueError(
            f"the loss must be finite and below {_LARGEST_LOSS:.0f} nats per token: got {loss} over {tokens} tokens; "
            "the model's weights are broken or its dtype overflows, try float32"
        )
    value = math.exp(loss)
    error = ratio_error(block_losses, block_tokens)
    scaled = None if error is None else value * error  # first order: d exp(x) = exp(x) dx
    return Perplexity(loss, value, scaled, tokens, tuple(block_losses), tuple(block_tokens))


def perplexity_ratio(measured: Perplexity, reference: Perplexity) -> tuple[float, float | None]:
    """Return measured / reference and its standard error, from the differences block by block.

    Raises:
        ValueError: the two were not measured on the same blocks.
    """
    if measured.block_tokens != reference.block_tokens:
        raise ValueError(
            "a ratio needs both models measured on the same blocks: got "
            f"{len(measured.block_tokens)} blocks of {measured.tokens} tokens and "
            f"{len(reference.block_tokens)} of {reference.tokens}; use the same data and block size"
        )
    ratio = math.exp(measured.loss - reference.loss)
    differences = [a - b for a, b in zip(measured.block_losses, reference.block_losses, strict=True)]
    error = ratio_error(differences, measured.block_tokens)
    return ratio, None if error is None else ratio * error


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return the standard error of sum(sums) / sum(counts), clusters being independent; None for one."""
    number, total = len(counts), sum(counts)
    if number < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * number / (number - 1)) / total
