"""Pair selections of other papers, computed as their formulas say, for the study `conversion`.

Fisher (RAP): sum over the pair's rows of W_Q and W_K of E (gradient x weight)^2. Scores (EliteKV's RoPElite): per head,
add the pair that most lowers the squared error of the raw logits, every causal position weighing the same. MHA2MLA's
energy rule is a choice of the library (`kvlatent.selection.pairs.strongest_pairs`). Both return the pairs of every layer
and key-value head in the order in which they are kept. Shapes: N query heads, K key-value heads, P channel pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvlatent.model.assembly import full_width
from kvlatent.model.families import attention_layers_of, effective_table, key_value_heads_of
from kvlatent.model.head import IGNORED
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.attention_rows import allowed, pair_layout, rotary_of

__all__ = ["SELECTIONS", "fisher_scores", "order_pairs_by_fisher", "order_pairs_by_scores", "score_grams"]

_CHUNK = 1 << 23
_ROWS = 32  # sampled query rows a block, as calibration samples them


def order_pairs_by_fisher(model: Any, blocks: Dataset, seed: int = 0) -> list[list[list[int]]]:
    """Pairs of every layer and key-value head, the highest Fisher score first; `seed` draws nothing."""
    scores = fisher_scores(model, _columns(model, blocks))
    return [[head.argsort(descending=True).tolist() for head in layer] for layer in scores]


def order_pairs_by_scores(model: Any, blocks: Dataset, seed: int = 0) -> list[list[list[int]]]:
    """Pairs of every layer and key-value head, in the order in which they most lower the error of the logits."""
    heads = key_value_heads_of(model.config)
    grams = score_grams(model, _columns(model, blocks), seed=seed)
    return [[add_greedily(group) for group in layer.split(len(layer) // heads)] for layer in grams]


def fisher_scores(model: Any, blocks: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """[K, P] a layer: gradients of each block's own next-token loss, squared block by block, then averaged.

    Args:
        blocks: columns `input_ids`, `position_ids`, `labels`, [1, T] each; the model is left as it is.
    """
    twin = full_width(model).eval().requires_grad_(False)
    layers = _attentions(twin)
    sides = [attention.parameters_of(part)[0] for attention in layers for part in ("q", "k")]
    weights = [weight for weight, _ in sides]
    sums, count = [torch.zeros(len(weight[rows]), dtype=torch.float64) for weight, rows in sides], 0
    for weight in weights:
        weight.requires_grad_(True)
    for block in blocks:
        places = {name: block[name] for name in ("input_ids", "position_ids")}
        logits = twin(**places, use_cache=False).logits
        loss = cross_entropy(logits[0].float(), block["labels"][0], ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, weights)
        for total, (weight, rows), gradient in zip(sums, sides, gradients, strict=True):
            total += (gradient * weight.detach())[rows].double().square().sum(1).cpu()
        count += 1
    scores = []
    for number, attention, *both in zip(
        attention_layers_of(model.config), layers, sums[::2], sums[1::2], strict=True
    ):
        rotary_dim = effective_table(model.config, number).rotary_dim
        by_head = [side.unflatten(0, (-1, attention.head_dim)) for side in both]
        queries, keys = (torch.add(*pair_layout(side, rotary_dim)) for side in by_head)
        scores.append((queries.unflatten(0, (len(keys), -1)).sum(1) + keys) / count)
    return scores


def _attentions(twin: Any) -> list[Any]:
    """The attention of every layer that has one, of a full-width twin."""
    decoder = twin.get_decoder()
    return [parts_of(decoder, layer).attention for layer in attention_layers_of(twin.config)]


@torch.no_grad()
def score_grams(
    model: Any, blocks: Iterable[dict[str, Tensor]], *, rows: int = _ROWS, seed: int = 0
) -> list[Tensor]:
    """[N, P, P] a layer: mean over sampled rows and the keys they see of m_i m_j, uncentred, unweighted; float64.

    Rows are drawn as `calibrate` draws them, so that both see the same text.
    """
    twin = full_width(model).eval()
    layers = _attentions(twin)
    sums = [torch.zeros(a.num_heads, a.d_qk // 2, a.d_qk // 2, dtype=torch.float64) for a in layers]
    generator, seen_keys = torch.Generator().manual_seed(seed), 0
    chosen = torch.zeros(0, dtype=torch.long)

    def see(total: Tensor) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            total.add_(_score_gram(module, twin.get_decoder(), hidden, positions, chosen).cpu())

        return hook

    with ExitStack() as hooks:
        for attention, total in zip(layers, sums, strict=True):
            hooks.callback(attention.register_forward_pre_hook(see(total), with_kwargs=True).remove)
        for block in blocks:
            ids, positions = block["input_ids"], block["position_ids"]
            chosen = torch.randperm(ids.shape[1], generator=generator)[:rows].sort().values.to(ids.device)
            seen_keys += int(allowed(positions, chosen[None], None).sum())
            twin.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    return [total / seen_keys for total in sums]


def _score_gram(attention: Any, decoder: Any, hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Sum over rows and visible keys of the products of pair contributions, of one block: [N, P, P]."""
    query, key, *_ = attention.project(hidden)
    cos, sin = rotary_of(attention, decoder, hidden, positions)
    query, key = (apply_rotary(x, cos, sin).float()[0] for x in (query, key))
    key = key.repeat_interleave(attention.num_key_value_groups, dim=0)
    queries, keys = pair_layout(query, cos.shape[-1]), pair_layout(key, cos.shape[-1])
    seen = allowed(positions, rows[None], attention.sliding_window)[0]
    size = max(1, _CHUNK // (key.shape[0] * key.shape[1] * key.shape[2]))
    total = torch.zeros((), device=hidden.device)
    for part, mask in zip(rows.split(size), seen.split(size), strict=True):
        pairs = queries[0][:, part, None] * keys[0][:, None] + queries[1][:, part, None] * keys[1][:, None]
        flat = (pairs * attention.scaling * mask[None, :, :, None]).flatten(1, 2)  # [N, r T, P]
        total = total + (flat.transpose(1, 2) @ flat).double()
    return total


def add_greedily(grams: Tensor) -> list[int]:
    """All pairs, each the one that then most lowers the summed 1^T G_dropped,dropped 1 of [M, P, P]."""
    gram = grams.sum(0)
    dropped = torch.ones(len(gram), dtype=gram.dtype)
    order: list[int] = []
    for _ in range(len(gram)):
        lowered = 2 * (gram @ dropped) - gram.diagonal()
        lowered[order] = float("-inf")
        order.append(int(lowered.argmax()))
        dropped[order[-1]] = 0
    return order


def _columns(model: Any, blocks: Dataset) -> Iterable[dict[str, Tensor]]:
    """Blocks one by one, on the model's device."""
    for block in blocks:
        names = ("input_ids", "position_ids", "labels")
        yield {name: torch.as_tensor(block[name], device=model.device).long()[None] for name in names}


SELECTIONS: dict[str, Callable[..., list[list[list[int]]]]] = {
    "fisher": order_pairs_by_fisher,
    "scores": order_pairs_by_scores,
}
"""By the name that stands for `keys` in the settings of a cell."""
