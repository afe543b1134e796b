"""Pair selections of other papers, computed as their formulas say, for `benchmarks/conversion.py`.

Fisher (RAP): sum over the pair's rows of W_Q and W_K of E (gradient x weight)^2. Scores (EliteKV's RoPElite): per head,
add the pair that most lowers the squared error of the raw logits, every causal position weighing the same. MHA2MLA's
energy rule is `kvlatent.selection.pairs.strongest_pairs`. Shapes: N query heads, K key-value heads, P channel pairs, T positions.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvlatent.model.assembly import full_width
from kvlatent.model.families import effective_table
from kvlatent.model.head import IGNORED
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.attention_rows import allowed, pair_layout

Pairs = tuple[tuple[tuple[int, ...], ...], ...]

_CHUNK = 1 << 23


def fisher_scores(model: Any, blocks: dict[str, Tensor]) -> list[Tensor]:
    """[K, P] a layer: gradients of each block's own next-token loss, squared block by block, then averaged.

    Args:
        blocks: columns `input_ids`, `position_ids`, `labels`, [blocks, T]; the model's gradients are left off.
    """
    layers = [layer.self_attn for layer in model.model.layers]
    sides = [(attention.q_proj.weight, attention.k_proj.weight) for attention in layers]
    weights = [weight for pair in sides for weight in pair]
    sums = [torch.zeros(weight.shape[0], dtype=torch.float64) for weight in weights]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for block in range(len(blocks["input_ids"])):
            batch = {name: column[block, None].long() for name, column in blocks.items()}
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
            loss = cross_entropy(logits[0].float(), batch["labels"][0], ignore_index=IGNORED)
            for total, weight, gradient in zip(
                sums, weights, torch.autograd.grad(loss, weights), strict=True
            ):
                total += (gradient * weight.detach()).double().square().sum(1)
    finally:
        model.requires_grad_(False)
    rotary_dim = effective_table(model.config).rotary_dim
    scores = []
    for index, attention in enumerate(layers):
        rows = [sums[2 * index + side].unflatten(0, (-1, attention.head_dim)) for side in (0, 1)]
        queries, keys = (sum(pair_layout(side, rotary_dim)) for side in rows)
        scores.append((queries.unflatten(0, (len(keys), -1)).sum(1) + keys) / len(blocks["input_ids"]))
    return scores


@torch.no_grad()
def score_grams(model: Any, blocks: dict[str, Tensor], *, rows: int = 32, seed: int = 0) -> list[Tensor]:
    """[N, P, P] a layer: mean over sampled rows and the keys they see of m_i m_j, uncentred, unweighted; float64.

    Rows are drawn as `calibrate` draws them, so that both see the same text.
    """
    twin = full_width(model).eval()
    layers = [layer.self_attn for layer in twin.model.layers]
    sums = [torch.zeros(a.num_heads, a.d_qk // 2, a.d_qk // 2, dtype=torch.float64) for a in layers]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(0, dtype=torch.long)
    seen_keys = 0

    def see(total: Tensor) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            total.add_(_score_gram(module, hidden, kwargs, chosen))

        return hook

    with ExitStack() as hooks:
        for attention, total in zip(layers, sums, strict=True):
            hooks.callback(attention.register_forward_pre_hook(see(total), with_kwargs=True).remove)
        for ids, positions in zip(blocks["input_ids"].long(), blocks["position_ids"].long(), strict=True):
            chosen = torch.randperm(len(ids), generator=generator)[:rows].sort().values
            seen_keys += int(allowed(positions[None], chosen[None], None).sum())
            twin.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return [total / seen_keys for total in sums]


def _score_gram(attention: Any, hidden: Tensor, kwargs: dict, rows: Tensor) -> Tensor:
    """Sum over rows and visible keys of the products of pair contributions, of one block: [N, P, P]."""
    query, key, _ = attention.project(hidden)
    cos, sin = kwargs["position_embeddings"]
    query, key = (apply_rotary(x, cos, sin).float()[0] for x in (query, key))
    key = key.repeat_interleave(attention.num_key_value_groups, dim=0)
    queries, keys = pair_layout(query, cos.shape[-1]), pair_layout(key, cos.shape[-1])
    seen = allowed(kwargs["position_ids"], rows[None], attention.sliding_window)[0]
    size = max(1, _CHUNK // (key.shape[0] * key.shape[1] * key.shape[2]))
    total = torch.zeros(())
    for part, mask in zip(rows.split(size), seen.split(size), strict=True):
        pairs = queries[0][:, part, None] * keys[0][:, None] + queries[1][:, part, None] * keys[1][:, None]
        flat = (pairs * attention.scaling * mask[None, :, :, None]).flatten(1, 2)  # [N, r T, P]
        total = total + (flat.transpose(1, 2) @ flat).double()
    return total


def greedy_without_gains(grams: Tensor, number: int) -> list[int]:
    """Pairs that, added one by one, most lower the summed 1^T G_dropped,dropped 1 of [M, P, P]; ascending."""
    gram = grams.sum(0)
    dropped = torch.ones(len(gram), dtype=gram.dtype)
    kept: list[int] = []
    for _ in range(number):
        lowered = 2 * (gram @ dropped) - gram.diagonal()
        lowered[kept] = float("-inf")
        kept.append(int(lowered.argmax()))
        dropped[kept[-1]] = 0
    return sorted(kept)


def top_pairs(scores: list[Tensor], d_qk: int) -> Pairs:
    """The d_qk / 2 highest-scoring pairs of every layer and key-value head ([K, P] a layer)."""
    return tuple(
        tuple(tuple(sorted(head.argsort(descending=True)[: d_qk // 2].tolist())) for head in layer)
        for layer in scores
    )


def score_pairs(grams: list[Tensor], num_key_value_heads: int, d_qk: int) -> Pairs:
    """`greedy_without_gains` for every layer and key-value head."""
    return tuple(
        tuple(
            tuple(greedy_without_gains(group, d_qk // 2))
            for group in layer.split(len(layer) // num_key_value_heads)
        )
        for layer in grams
    )
