"""How far a latent model has moved from its original: next-token distributions, every layer, every layer's attention.

Perplexity on one text can hold while a model changes; the divergence from the original cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from kvlatent.checkpoints.load import check_block_size
from kvlatent.checkpoints.source import check_same_vocabulary
from kvlatent.evaluation import check
from kvlatent.evaluation.check import CheckRequest, Levels, Settings
from kvlatent.evaluation.checks.layerwise import LayerSums, as_latent, in_lockstep, sampled_rows
from kvlatent.evaluation.evidence import FORGETTING_NATS, Figures, Sign, figure
from kvlatent.evaluation.perplexity import ratio_error
from kvlatent.evaluation.sequences import check_counts, counter, evaluation_mode
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.record import with_error
from kvlatent.model.families import attention_layers_of
from kvlatent.model.head import IGNORED, Head
from kvlatent.model.time_estimate import rows_at_once

__all__ = ["CHECK", "ENTROPY_RATIO", "FOCUS_KEPT", "check_fidelity", "compare_tokens", "fidelity"]

FOCUS_KEPT = 0.5
"""Share of a layer's focus that is kept; focus is how far attention is from uniform, 1 - entropy / log of keys seen.
Below half, a layer is nearer to uniform than to the original. In the embedded model, no layer had less than 0.66 at a
perplexity ratio of 1.2; at 30, where attention is lost, two of four layers had less than 0.3."""

ENTROPY_RATIO = 1.25
"""Least rise of a layer's entropy that counts as collapse. It spares layers that were close to uniform already, whose
focus is a small number with a large relative error."""

_BLOCKS = (2, 4, 8, 16, 32)  # that nobody chose
_PASSES = 1.5  # of two scored ones: attention is compared row by row as well
_MOST_BLOCKS = 4
_CHUNK_TOKENS = 256  # logits of both models are held for that many tokens


def fidelity(
    original: PreTrainedModel,
    latent: PreTrainedModel,
    blocks: Any,
    *,
    batch_size: int | None = None,
    rows: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a latent model with its original, on blocks from `kvlatent.text`.

    A token counts where `labels` has something to predict, as in `perplexity`. A layer's error is measured on its
    output behind the norm that the original puts next (before it, a few channels of huge activation drown the rest),
    relative to what varies: 0 is equal, 1 is what the mean of the original's outputs would score. Attention is
    compared on query rows that see two keys or more; softmax over keys, mean over heads and rows.

    Args:
        original, latent: on one device, of one vocabulary and one shape; they are left as they were. The original runs
            as its full-width latent twin.
        blocks: `[i : j]` has input_ids, position_ids and labels, [j - i, T]; positions that restart separate
            documents.
        batch_size: blocks a step; None takes 4, fewer of a large model.
        rows: query rows sampled a block, the same of both models and in all layers.
        seed: of the sampling.
        progress: called with the blocks done and their number.

    Returns:
        `kl` (original from latent, mean nats a token) and `kl_standard_error` (blocks as clusters; None for one
        block), `top1_agreement` (share of tokens with equal argmax), `tokens`, and `layers`, one dict a layer: `layer`, `relative_error`, `attention_kl`, `entropy_original` and `entropy_latent` (nats),
        `entropy_ratio` (latent over original; None where the original's is 0), `uniformity_original` and
        `uniformity_latent` (entropy over the log of the keys seen: 1 is uniform).

    Raises:
        ValueError: vocabularies or shapes that differ, blocks longer than the context, nothing to predict, no row that
            sees two keys, logits that are not finite, batch_size or rows below 1.
    """
    check_fidelity(original, latent, batch_size=batch_size, rows=rows, seed=seed)
    pair = as_latent(original), as_latent(latent)
    if batch_size is None:
        longest = max(map(len, blocks[0:1]["input_ids"]), default=1)
        batch_size = rows_at_once(original, longest, _MOST_BLOCKS, scored=True)
    sums = {layer: LayerSums() for layer in attention_layers_of(pair[0].config)}
    generator = torch.Generator().manual_seed(seed)
    divergences: list[float] = []
    counts: list[int] = []
    agreed = 0
    heads = [Head.of_model(model) for model in pair]
    advance = counter(progress, len(blocks))
    with evaluation_mode(*pair):
        for ids, positions, labels in _batches(blocks, batch_size, original.device):
            check_block_size(original.config, ids.shape[1])
            chosen = sampled_rows(positions, rows, generator)
            hidden = in_lockstep(pair, ids, positions, chosen, sums)
            for block in range(len(ids)):
                counted = labels[block] != IGNORED
                divergence, same = compare_tokens(heads, [states[block, counted] for states in hidden])
                divergences.append(divergence)
                agreed += same
                counts.append(int(counted.sum()))
            advance(len(ids))
    tokens = sum(counts)
    if tokens == 0:
        raise ValueError(f"fidelity needs tokens to predict: {len(counts)} blocks hold 0; give more text")
    return {
        "kl": sum(divergences) / tokens,
        "kl_standard_error": ratio_error(divergences, counts),
        "top1_agreement": agreed / tokens,
        "tokens": tokens,
        "layers": [{"layer": index} | one.finish() for index, one in sums.items()],
    }


def check_fidelity(
    original: Any,
    latent: Any,
    *,
    batch_size: int | None = None,
    rows: int = 64,
    seed: int = 0,
) -> None:
    """Raise what `fidelity`, which has the same arguments, raises before anything runs."""
    check_counts(seed=(seed, 0))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one block: got batch_size={batch_size}; try 4")
    if rows < 1:
        raise ValueError(f"attention is compared on at least 1 query row a block: got rows={rows}; try 64")
    check_same_vocabulary(original, latent)
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        sizes = [getattr(model.config, name) for model in (original, latent)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"layers are compared one to one, so both models must have the same {name}: got {sizes[0]} and {sizes[1]}; "
                "compare with the model it came from"
            )


def _batches(blocks: Any, size: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Ids, positions and labels, [B, T] each."""
    for first in range(0, len(blocks), size):
        columns = blocks[first : first + size]
        names = ("input_ids", "position_ids", "labels")
        yield [torch.as_tensor(columns[name], device=device).long() for name in names]


def compare_tokens(heads: Sequence[Head], hidden: Sequence[Tensor]) -> tuple[float, int]:
    """Summed divergence in nats, and how many argmaxes agree, of tokens [n, D]; no more than a chunk of logits lives.

    Args:
        heads, hidden: of the original and of the latent model.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
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


def _split(request: CheckRequest, options: Settings) -> tuple[Any, Settings]:
    """The blocks, and the other options."""
    size, others = request.models["latent"].config.vocab_size, dict(options)
    return request.text.blocks(request.tokenizer, size, request.window, others.pop("blocks")), others


def _refuse(request: CheckRequest, options: Settings) -> None:
    _, others = _split(request, options)
    check_fidelity(request.models["original"], request.models["latent"], **others)


def _run(request: CheckRequest, options: Settings, progress: Progress) -> Figures:
    """Distance of the latent model from its original."""
    step = progress.step("fidelity")
    blocks, others = _split(request, options)
    pair = [request.models[role] for role in ("original", "latent")]
    return {"fidelity": fidelity(*pair, blocks, progress=step.to, **others)}


def _extents(request: CheckRequest) -> Levels:
    return [({"blocks": n}, _PASSES * request.seconds(request.window, n, scored=True)) for n in _BLOCKS]


def _lines(figures: Figures) -> list[str]:
    if "fidelity" not in figures:
        return []
    distance = figures["fidelity"]
    kl = with_error(distance["kl"], distance["kl_standard_error"], 4)
    return [
        f"KL from the original: {kl} nats a token; same likeliest token: {distance['top1_agreement']:.1%}"
    ]


def _divergence_sign(figures: Figures, missing: list[str]) -> Sign:
    distance = figures.get("fidelity")
    if not distance:
        missing.append("divergence: needs the fidelity of the two models")
        return Sign({})
    return Sign({"kl": figure(distance["kl"], FORGETTING_NATS, distance.get("kl_standard_error"))})


def _collapse_sign(figures: Figures, missing: list[str]) -> Sign:
    """Layers have lost most of their focus, and their entropy has risen."""
    rows = [
        (max(1.0 - row["uniformity_latent"], 0.0) / (1.0 - row["uniformity_original"]), row)
        for row in (figures.get("fidelity") or {}).get("layers", ())
        if row.get("uniformity_original", 1.0) < 1.0
    ]
    if not rows:
        missing.append("attention: needs the fidelity layer by layer")
        return Sign({})
    risen = [pair for pair in rows if (pair[1]["entropy_ratio"] or math.inf) >= ENTROPY_RATIO]
    fallen = [pair for pair in risen if pair[0] < FOCUS_KEPT]
    focus, worst = min(fallen or rows, key=lambda pair: pair[0])
    where = {"layer": worst["layer"], "layers": [row["layer"] for _, row in fallen]}
    uniformity = {name: worst[f"uniformity_{name}"] for name in ("original", "latent")}
    evidence = {
        "focus_kept": figure(focus, FOCUS_KEPT) | where | uniformity,
        "entropy_ratio": figure(worst["entropy_ratio"], ENTROPY_RATIO) | where,
    }
    advice = (
        "The logits of these layers no longer tell tokens apart: widen keys (--d-qk, or --kv with --per-layer), convert "
        "with --preset calibrated, which keeps the softmax scale and aligns attention (--align 200), and train stage I."
    )
    return Sign(evidence, advice if fallen else None)


CHECK = check.Check(
    name="fidelity",
    arguments=(check.DATA, check.BLOCK_SIZE, check.BATCH_SIZE),
    refuse=_refuse,
    run=_run,
    extents=_extents,
    may_be_left_out=True,
    units={"blocks": "blocks"},
    needs_original=True,
    lines=_lines,
    signs={"forgetting": _divergence_sign, "attention collapse": _collapse_sign},
)
