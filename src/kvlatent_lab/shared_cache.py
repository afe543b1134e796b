"""A model whose neighbouring layers share one cache: of layers 2j and 2j + 1 the second reads the keys and values of the first.

A construct for comparisons (cross-layer attention), not a model that is saved: it is built out of latent attention modules,
so that training and measuring need nothing of their own. A pair of layers counts as one attention layer with the queries
of both: its keys and values are the mean of both layers' projections, or the first one's, and where they are narrow as
well, pairs and directions are chosen for the queries and outputs of both. From the weights alone; no text is looked at.

Shapes: B batch, T query positions, D model width, K key-value heads, G query heads of each, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from kvlatent.conversion.value_weights import take_rows
from kvlatent.model.assembly import assemble, full_width, original_attention
from kvlatent.model.attention import LatentAttention
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import effective_table, family_of, head_dim_of, key_value_heads_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.projection import Projected
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.attention_rows import pair_layout
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.latent_config import choose
from kvlatent.selection.pairs import strongest_pairs
from kvlatent.selection.paper_rules import product_svd

__all__ = ["SHARED", "share_cache"]

SHARED = ("mean", "first")
"""Whose projections of keys and values a pair of layers has: the mean of both, or the first layer's."""


class Leader(LatentAttention):
    """Attention that leaves what it projected for the layer behind it."""

    shown: Projected | None = None

    def project(self, hidden_states: Tensor) -> Projected:
        """As every latent attention."""
        self.shown = super().project(hidden_states)
        return self.shown


class Follower(nn.Module):
    """Attention of a layer that caches nothing: its own queries and outputs, keys and values of the layer before.

    Args:
        attention: the layer's latent attention; its projections of queries and outputs go on.
        leader: of the layer before.
    """

    def __init__(self, attention: Any, leader: Leader) -> None:
        super().__init__()
        self.q_proj, self.o_proj = attention.q_proj, attention.o_proj
        self.num_heads, self.scaling = attention.num_heads, attention.scaling
        self.leaders = (leader,)  # in a tuple, since it is no part of this module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:
        """Attention output [B, T, D], and None for the weights."""
        (leader,) = self.leaders
        projected, leader.shown = leader.shown, None
        assert projected is not None, "the layer before has not run"
        if leader.rotary is not None:
            position_embeddings = leader.rotary(hidden_states, position_embeddings)
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key = (apply_rotary(each, *position_embeddings) for each in (query, projected.key))
        value = projected.value
        if past_key_values is not None:  # which the layer before has updated
            held = past_key_values.layers[leader.layer_idx]
            key, value = held.keys, held.values
        groups = self.num_heads // key.shape[1]
        output = scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            attn_mask=attention_mask,
            is_causal=attention_mask is None and query.shape[2] > 1,
            scale=self.scaling,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


@torch.no_grad()
def share_cache(model: PreTrainedModel, shared: str, d_qk: int, d_vo: int) -> PreTrainedModel:
    """A copy of `model` whose pairs of layers share keys of width `d_qk` and values of `d_vo`; an odd last layer is alone.

    Args:
        model: an original with plain attention: three projections, no biases, no QK-norm, no sliding window.
        shared: one of `SHARED`.
        d_qk, d_vo: channels of a head, the head's own or fewer.

    Raises:
        ValueError: the model's attention is not plain, or there is no such way to share, or no such width.
    """
    _check(model, shared)
    config, layers = model.config, range(model.config.num_hidden_layers)
    pairs = [tuple(layers[at : at + 2]) for at in layers[::2]]
    sources = [[original_attention(model, layer) for layer in pair] for pair in pairs]
    keys_values = [_shared_projections(each, shared) for each in sources]
    gains = [parts_of(model.get_decoder(), layer).attention_norm.weight.double() for layer in layers]
    ranked = strongest_pairs(
        [
            _energy(model, *each, pair, gains)
            for pair, each in zip(pairs, zip(sources, keys_values, strict=True), strict=True)
        ],
        d_qk,
    )
    kept = tuple(each for each, pair in zip(ranked, pairs, strict=True) for _ in pair)
    choices = resolve_choices("own-frequency", keys="weights", table="head")
    latent = choose(config, d_qk, d_vo, choices, pairs=kept)
    made: dict[int, dict[str, Tensor]] = {}
    for pair, source, both in zip(pairs, sources, keys_values, strict=True):
        made |= zip(pair, _narrowed(source, both, latent, pair[0], key_value_heads_of(config)), strict=True)
    result = assemble(model, latent, lambda layer: made[layer])
    decoder = result.get_decoder()
    for first, second in (pair for pair in pairs if len(pair) == 2):
        leader = decoder.layers[first].self_attn
        leader.__class__ = Leader
        decoder.layers[second].self_attn = Follower(decoder.layers[second].self_attn, leader)
    return result


def _check(model: PreTrainedModel, shared: str) -> None:
    family, config = family_of(model.config), model.config
    if shared not in SHARED:
        raise ValueError(f"layers share the {' or the '.join(SHARED)} of their projections: got {shared!r}")
    attention = parts_of(full_width(model).get_decoder(), 0).attention
    plain = not (family.fused_qkv or family.qk_norm or family.gates_output or family.attention_layer_type)
    if (
        not plain
        or family.sliding_window(config, 0)
        or attention.k_proj.bias is not None
        or attention.o_proj.bias is not None
    ):
        raise ValueError(
            f"a shared cache is built of plain attention (three projections without biases, norms, gates or a window): got "
            f"{config.model_type!r}; take a Llama"
        )


def _shared_projections(sources: list[dict[str, Tensor]], shared: str) -> tuple[Tensor, Tensor]:
    """W_K and W_V of a pair of layers, in float64; of a layer alone its own."""
    used = sources if shared == "mean" else sources[:1]
    keys, values = (
        torch.stack([one[f"{part}_proj.weight"].double() for one in used]).mean(0) for part in "kv"
    )
    return keys, values


def _energy(
    model: PreTrainedModel,
    sources: list[dict[str, Tensor]],
    shared: tuple[Tensor, Tensor],
    pair: tuple[int, ...],
    gains: list[Tensor],
) -> Tensor:
    """E|q_j|^2 E|k_j|^2 of a pair's channel pairs, as if normalised inputs were white: [K, d / 2]."""
    heads, turning = key_value_heads_of(model.config), effective_table(model.config, pair[0]).rotary_dim

    def energies(weight: Tensor, gain: Tensor) -> Tensor:
        rows = (weight.double() * gain).square().sum(1).view(-1, head_dim_of(model.config))
        first, second = pair_layout(rows, turning)
        return (first + second).unflatten(0, (heads, -1)).sum(1)

    queries = sum(
        energies(one["q_proj.weight"], gains[layer]) for one, layer in zip(sources, pair, strict=True)
    )
    return queries * energies(shared[0], gains[pair[0]])


def _narrowed(
    sources: list[dict[str, Tensor]],
    shared: tuple[Tensor, Tensor],
    latent: LatentConfig,
    layer: int,
    heads: int,
) -> list[dict[str, Tensor]]:
    """Attention tensors of the layers of a pair at the latent widths, on one set of keys and values."""
    like, head_dim = sources[0]["q_proj.weight"], latent.original_head_dim
    (d_qk, d_vo), (keys, values) = latent.widths_at(layer), shared
    queries = [one["q_proj.weight"].double() for one in sources]
    outputs = [one["o_proj.weight"].double() for one in sources]
    if d_qk < head_dim:
        channels = latent.channels_at(layer)
        keys = take_rows(keys, channels, head_dim)
        queries = [take_rows(one, channels, head_dim) * (d_qk / head_dim) ** 0.5 for one in queries]
    if d_vo < head_dim:
        values, outputs = _narrow_values(values, outputs, d_vo, heads)
    return [
        {
            name: tensor.to(like).contiguous()
            for name, tensor in zip(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
                (query, keys, values, output),
                strict=True,
            )
        }
        for query, output in zip(queries, outputs, strict=True)
    ]


def _narrow_values(
    values: Tensor, outputs: list[Tensor], d_vo: int, heads: int
) -> tuple[Tensor, list[Tensor]]:
    """Values and every layer's outputs by the SVD of their product, a key-value head with the outputs of all layers."""
    rows = values.unflatten(0, (heads, -1))  # [K, d, D]
    size, head_dim = values.shape[1], rows.shape[1]
    blocks = [
        one.unflatten(1, (heads, -1, head_dim)).permute(1, 2, 0, 3) for one in outputs
    ]  # [K, G, D, d] a layer
    narrow, read = [], []
    for head in range(heads):
        value, _, output = product_svd(
            rows[head], None, torch.cat([one[head].flatten(0, 1) for one in blocks]), d_vo
        )
        narrow.append(value)
        read.append(output.view(len(outputs), -1, size, d_vo))
    by_layer = torch.stack(read, dim=1)  # [layers, K, G, D, d_vo]
    return torch.cat(narrow), [one.permute(2, 0, 1, 3).flatten(1) for one in by_layer]
