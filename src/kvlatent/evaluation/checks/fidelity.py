"""How far a latent model has moved from its original: next-token distributions, every layer, every layer's attention.

Perplexity on one text can hold while a model changes; the divergence from the original cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from kvlatent.checkpoints.load import check_block_size
from kvlatent.checkpoints.source import check_same_vocabulary
from kvlatent.evaluation.checks.layerwise import LayerSums, as_latent, in_lockstep, sampled_rows
from kvlatent.evaluation.perplexity import ratio_error
from kvlatent.evaluation.sequences import check_counts
from kvlatent.model.head import IGNORED, Head
from kvlatent.model.time_estimate import rows_at_once

__all__ = ["check_fidelity", "fidelity"]

_MOST_BLOCKS = 4
_CHUNK_TOKENS = 256  # logits of both models are held for that many tokens


@torch.no_grad()
def fidelity(
    original: PreTrainedModel,
    latent: PreTrainedModel,
    blocks: Any,
    *,
    batch_size: int | None = None,
    rows: int = 64,
    seed: int = 0,
    layers: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a latent model with its original, on blocks from `kvlatent.text`.

    A token counts where `labels` has something to predict, as in `perplexity`. A layer's error is measured on its
    output behind the norm that the original puts next (before it, a few channels of huge activation drown the rest),
    relative to what varies: 0 is equal, 1 is what the mean of the original's outputs would score. Attention is
    compared on query rows that see two keys or more; softmax over keys, mean over heads and rows.

    Args:
        original, latent: on one device; models of one vocabulary and, with `layers`, one shape. They are left as they
            were.
        blocks: `[i : j]` has input_ids, position_ids and labels, [j - i, T]; positions that restart separate
            documents.
        batch_size: blocks a step; None takes 4, fewer of a large model.
        rows: query rows sampled a block, the same of both models and in all layers.
        seed: of the sampling.
        layers: compare layer by layer, which runs the original as its full-width latent twin. Without, any two causal
            models do.
        progress: called with the blocks done and their number.

    Returns:
        `kl` (original from latent, mean nats a token) and `kl_standard_error` (blocks as clusters; None for one
        block), `top1_agreement` (share of tokens with equal argmax), `tokens`, and `layers`, one dict a layer (none
        without `layers`): `layer`, `relative_error`, `attention_kl`, `entropy_original` and `entropy_latent` (nats),
        `entropy_ratio` (latent over original; None where the original's is 0), `uniformity_original` and
        `uniformity_latent` (entropy over the log of the keys seen: 1 is uniform).

    Raises:
        ValueError: vocabularies or shapes that differ, blocks longer than the context, nothing to predict, no row that
            sees two keys, logits that are not finite, batch_size or rows below 1.
    """
    check_fidelity(original, latent, batch_size=batch_size, rows=rows, seed=seed, layers=layers)
    pair = (as_latent(original), as_latent(latent)) if layers else (original, latent)
    if batch_size is None:
        longest = max(map(len, blocks[0:1]["input_ids"]), default=1)
        batch_size = rows_at_once(original, longest, _MOST_BLOCKS, scored=True)
    sums = [LayerSums() for _ in pair[0].model.layers] if layers else []
    generator = torch.Generator().manual_seed(seed)
    divergences: list[float] = []
    counts: list[int] = []
    agreed = 0
    with ExitStack() as modes:
        for model in pair:
            modes.callback(model.train, model.training)
            model.eval()
        if progress is not None:
            progress(0, len(blocks))
        for ids, positions, labels in _batches(blocks, batch_size, original.device):
            check_block_size(original.config, ids.shape[1])
            if layers:
                chosen = sampled_rows(positions, rows, generator)
                hidden = in_lockstep(pair, ids, positions, chosen, sums)
            else:
                hidden = [
                    m.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
                    for m in pair
                ]
            for block in range(len(ids)):
                counted = labels[block] != IGNORED
                found = _compare_tokens(pair, [states[block, counted] for states in hidden])
                divergences.append(found[0])
                agreed += found[1]
                counts.append(int(counted.sum()))
            if progress is not None:
                progress(len(counts), len(blocks))
    tokens = sum(counts)
    if tokens == 0:
        raise ValueError(f"fidelity needs tokens to predict: {len(counts)} blocks hold 0; give more text")
    return {
        "kl": sum(divergences) / tokens,
        "kl_standard_error": ratio_error(divergences, counts),
        "top1_agreement": agreed / tokens,
        "tokens": tokens,
        "layers": [{"layer": index} | one.finish() for index, one in enumerate(sums)],
    }


def check_fidelity(
    original: Any,
    latent: Any,
    *,
    batch_size: int | None = None,
    rows: int = 64,
    seed: int = 0,
    layers: bool = True,
) -> None:
    """Raise what `fidelity`, which has the same arguments, raises before anything runs."""
    check_counts(seed=(seed, 0))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one block: got batch_size={batch_size}; try 4")
    if rows < 1:
        raise ValueError(f"attention is compared on at least 1 query row a block: got rows={rows}; try 64")
    check_same_vocabulary(original, latent)
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size") if layers else ():
        found, other = (getattr(model.config, name) for model in (original, latent))
        if found != other:
            raise ValueError(
                f"layers are compared one to one, so both models must have the same {name}: got {found} and {other}; "
                "compare with the model it came from, or pass layers=False"
            )


def _batches(blocks: Any, size: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Ids, positions and labels, [B, T] each."""
    for first in range(0, len(blocks), size):
        columns = blocks[first : first + size]
        names = ("input_ids", "position_ids", "labels")
        yield [torch.as_tensor(columns[name], device=device).long() for name in names]


def _compare_tokens(pair: tuple[Any, Any], hidden: list[Tensor]) -> tuple[float, int]:
    """Summed divergence in nats, and how many argmaxes agree, of tokens [n, D]; no more than a chunk of logits lives."""
    heads = [Head.of(model.get_output_embeddings()) for model in pair]
    total, agreed = 0.0, 0
    for states in zip(*(h.split(_CHUNK_TOKENS) for h in hidden), strict=True):
        logits = [head.logits(part) for head, part in zip(heads, states, strict=True)]
        for name, part in zip(("original", "latent"), logits, strict=True):
            if not torch.isfinite(part).all():
                raise ValueError(
                    f"logits must be finite: the {name} model gave NaN or infinity among {part.numel()}; its weights "
                    "are broken or its dtype overflows, try float32"
                )
        agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        wanted, given = (log_softmax(part, dim=-1) for part in logits)
        total += float((wanted.exp() * (wanted - given)).sum(dtype=torch.float64))
    return total, agreed
