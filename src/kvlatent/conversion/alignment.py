"""One latent layer tuned to its original, without labels and with nothing else in memory.

Attention alignment: the queries and keys learn to give the original's attention distributions on the original's own
inputs; the keys that stay take over what the dropped pairs carried. Output alignment: the narrow projections learn to
give the original layer's output on the *converted* model's inputs, so that each layer also mends what those below left.

Shapes: B blocks of a step, T positions, R sampled query rows, N query heads, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from kvlatent.conversion.tuning import BLOCKS, Chosen, tune
from kvlatent.model.hidden_states import Stream
from kvlatent.selection.attention_rows import row_logits

__all__ = ["LayerPair", "align_attention", "align_output", "tuned_copy"]


@dataclass
class LayerPair:
    """One layer of the original (as its full-width twin) and of the latent model, and what flows into them.

    Args:
        index: of the layer.
        original, latent: the two decoders.
        attention: float32 copy of the latent attention, which is tuned.
        inputs, latent_inputs: hidden states before the layer, of the original and of the converted model.
        outputs: of the original layer.
        positions: [blocks, T].
        held_out: indices of the blocks that only measure; the others are learnt from.
    """

    index: int
    original: Any
    latent: Any
    attention: Any
    inputs: Stream
    latent_inputs: Stream
    outputs: Stream
    positions: Tensor
    held_out: list[int]


def tuned_copy(attention: Any) -> Any:
    """A float32 copy of a latent attention module, with parameters of its own, all frozen."""
    made = copy.deepcopy(attention).float()
    return made.requires_grad_(False)


def align_attention(pair: LayerPair, steps: int, seed: int, progress: Callable[[], None]) -> dict[str, float]:
    """Tune queries and keys on KL(original, latent) of the attention rows, on the original's inputs.

    Returns:
        Mean divergence a row and head, in nats, on held-out blocks before and after.
    """
    layer = pair.original.layers[pair.index]

    def loss(blocks: list[int], rows: Tensor) -> Tensor:
        with torch.no_grad():
            hidden, positions = pair.inputs.read(blocks), pair.positions[blocks]
            normed = layer.input_layernorm(hidden)
            target = log_softmax(
                row_logits(layer.self_attn, pair.original, normed, positions, rows)[0], dim=-1
            )
        logits, _ = row_logits(pair.attention, pair.latent, normed.float(), positions, rows)
        return (target.exp() * (target - log_softmax(logits, dim=-1))).sum(-1).mean()

    return _tuned(pair, _key_parameters(pair.attention), loss, steps, seed, progress)


def align_output(
    pair: LayerPair, steps: int, seed: int, progress: Callable[[], None], *, keys: bool, values: bool
) -> dict[str, float]:
    """Tune the narrow sides on the error of the layer's output, on the converted model's inputs.

    Args:
        keys, values: whether that side is narrow; a side at full width stays as it is.

    Returns:
        Squared error behind the next norm, relative to what it should give, on held-out blocks before and after.
    """
    layer = pair.latent.layers[pair.index]
    dtype = layer.input_layernorm.weight.dtype
    following = _next_norm(pair)
    with torch.no_grad():
        energy = (
            following(pair.outputs.read(list(range(min(BLOCKS, len(pair.positions))))))
            .float()
            .square()
            .mean()
        )

    def loss(blocks: list[int], rows: Tensor) -> Tensor:
        with torch.no_grad():
            hidden, positions = pair.latent_inputs.read(blocks), pair.positions[blocks]
            normed = layer.input_layernorm(hidden).float()
            index = rows[..., None].expand(-1, -1, hidden.shape[-1])
            wanted = pair.outputs.read(blocks).gather(1, index)
            hidden = hidden.gather(1, index)
        logits, value = row_logits(pair.attention, pair.latent, normed, positions, rows)
        mixed = softmax(logits, dim=-1) @ value.repeat_interleave(pair.attention.num_key_value_groups, dim=1)
        middle = hidden + pair.attention.o_proj(mixed.transpose(1, 2).flatten(2)).to(dtype)
        given = middle + layer.mlp(layer.post_attention_layernorm(middle))
        return (following(given) - following(wanted)).float().square().mean() / energy

    chosen = (_key_parameters(pair.attention) if keys else []) + (
        _value_parameters(pair.attention) if values else []
    )
    return _tuned(pair, chosen, loss, steps, seed, progress)


def _tuned(
    pair: LayerPair,
    chosen: Chosen,
    loss: Callable[[list[int], Tensor], Tensor],
    steps: int,
    seed: int,
    progress: Callable[[], None],
) -> dict[str, float]:
    width = pair.attention.o_proj.out_features
    return tune(
        chosen,
        loss,
        pair.positions,
        pair.held_out,
        fan_in=width,
        steps=steps,
        seed=seed + 1000 * pair.index,
        progress=progress,
    )


def _next_norm(pair: LayerPair) -> Any:
    """What the layer's output passes next: the following layer's norm, or the decoder's.

    Errors are measured behind it, as that layer sees them. Before it, the few channels and tokens of huge activation
    that most models have would drown the rest.
    """
    layers = pair.original.layers
    return pair.original.norm if pair.index + 1 == len(layers) else layers[pair.index + 1].input_layernorm


def _key_parameters(attention: Any) -> Chosen:
    if attention.q_map is not None:
        return [(attention.q_map, None)]
    if hasattr(attention, "qkv_proj"):
        return [(p, slice(0, sum(attention.widths[:2]))) for p in attention.qkv_proj.parameters()]
    modules = [attention.q_proj, attention.k_proj]
    modules += [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    return [(parameter, None) for module in modules for parameter in module.parameters()]


def _value_parameters(attention: Any) -> Chosen:
    outputs: Chosen = [(parameter, None) for parameter in attention.o_proj.parameters()]
    if hasattr(attention, "qkv_proj"):
        return outputs + [
            (p, slice(sum(attention.widths[:2]), None)) for p in attention.qkv_proj.parameters()
        ]
    return outputs + [(parameter, None) for parameter in attention.v_proj.parameters()]
