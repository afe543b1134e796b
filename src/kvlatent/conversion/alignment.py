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

from kvlatent.conversion.tuning import BLOCKS, TunableRows, tune
from kvlatent.jobs.devices import precision
from kvlatent.model.hidden_states import HiddenStates
from kvlatent.model.layer_parts import final_norm, first_norm, layer_output, parts_of
from kvlatent.selection.attention_rows import (
    document_ids,
    masked_logits,
    rotary_by_position,
    seen_keys,
    turned_logits,
)

__all__ = [
    "TunedLayer",
    "align_attention",
    "align_output",
    "copy_for_tuning",
    "key_parameters",
    "value_parameters",
]


@dataclass
class TunedLayer:
    """One layer of the latent model that is being tuned, its original (as its full-width twin), and what flows into both.

    Args:
        index: of the layer.
        original, latent: the two decoders.
        attention: float32 copy of the latent attention, which is tuned; None in a layer without.
        streams: what flows, each [blocks, T, ...]: "inputs" and "latent", hidden states before the layer, of the original and
            of the converted model; "outputs" of the original layer and "wanted", its attention's output plus what of its input that output can make up for;
            "queries" [N d] and "keys" [K d] of the original, rotated, where the attention is aligned.
        positions: [blocks, T].
        held_out: indices of the blocks that only measure; the others are learnt from.
        dtype: of the products, "float32" or "bfloat16".
    """

    index: int
    original: Any
    latent: Any
    attention: Any
    streams: dict[str, HiddenStates]
    positions: Tensor
    held_out: list[int]
    dtype: str = "float32"


def copy_for_tuning(attention: Any) -> Any:
    """A float32 copy of a latent attention module, with parameters of its own, all frozen."""
    return copy.deepcopy(attention).float().requires_grad_(False)


def align_attention(
    tuned: TunedLayer, steps: int, seed: int, progress: Callable[[], None]
) -> dict[str, float]:
    """Tune queries and keys on KL(original, latent) of the attention rows, on the original's inputs.

    Returns:
        Mean divergence a row and head, in nats, on held-out blocks before and after.
    """
    original = parts_of(tuned.original, tuned.index)
    rows_of = _RowsOf(tuned)

    def targets(blocks: list[int], rows: Tensor, seen: Tensor) -> Tensor:
        query, key = (
            tuned.streams[name].read(blocks).unflatten(-1, (-1, original.attention.d_qk)).transpose(1, 2)
            for name in ("queries", "keys")
        )
        query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
        return masked_logits(original.attention, query, key, seen)

    def loss(blocks: list[int], rows: Tensor) -> Tensor:
        with torch.no_grad():
            normed = original.attention_norm(tuned.streams["inputs"].read(blocks)).float()
            *turned, seen = rows_of(blocks, rows)
            target = targets(blocks, rows, seen)
            attention, target = softmax(target, dim=-1), log_softmax(target, dim=-1)
        logits = turned_logits(tuned.attention, normed, rows, *turned, seen)
        return (attention * (target - log_softmax(logits, dim=-1))).sum(-1).mean()

    return _tune(tuned, key_parameters(tuned.attention), loss, steps, seed, progress)


def align_output(
    tuned: TunedLayer, steps: int, seed: int, progress: Callable[[], None], *, keys: bool, values: bool
) -> dict[str, float]:
    """Tune the narrow sides on the error of the layer's output, on the converted model's inputs.

    Args:
        keys, values: whether that side is narrow; a side at full width stays as it is.

    Returns:
        Squared error behind the next norm, relative to what it should give, on held-out blocks before and after.
    """
    layer = parts_of(tuned.latent, tuned.index)
    dtype, gated = tuned.latent.dtype, bool(tuned.attention.gate_width)
    following, rows_of = _next_norm(tuned), _RowsOf(tuned)
    with torch.no_grad():
        energy = (
            following(tuned.streams["outputs"].read(list(range(min(BLOCKS, len(tuned.positions))))))
            .float()
            .square()
            .mean()
        )

    def loss(blocks: list[int], rows: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = tuned.streams["latent"].read(blocks)
            normed = layer.attention_norm(hidden).float()
            index = rows[..., None].expand(-1, -1, hidden.shape[-1])
            wanted = following(tuned.streams["outputs"].read(blocks).gather(1, index))
            hidden = hidden.gather(1, index)
            turned = rows_of(blocks, rows)
        logits = turned_logits(tuned.attention, normed, rows, *turned)
        value = tuned.attention.project_one("v", normed)
        grouped = softmax(logits, dim=-1).unflatten(1, (value.shape[1], -1))  # [B, K, G, R, T]
        mixed = (grouped.flatten(2, 3) @ value.to(grouped.dtype)).view(*logits.shape[:3], -1)
        gate = tuned.attention.project_one("gate", normed.gather(1, index)) if gated else None
        attended = tuned.attention.read_out(mixed.transpose(1, 2).flatten(2), gate).to(dtype)
        given = layer_output(tuned.latent, tuned.index, hidden, attended)
        return (following(given) - wanted).float().square().mean() / energy

    chosen = (key_parameters(tuned.attention) if keys else []) + (
        value_parameters(tuned.attention) if values else []
    )
    return _tune(tuned, chosen, loss, steps, seed, progress)


class _RowsOf:
    """Cosines and sines of blocks of a layer that is tuned, and what their sampled rows see; asked at every step."""

    def __init__(self, tuned: TunedLayer) -> None:
        like = torch.empty(0, device=tuned.positions.device)  # as normed hidden states are: float32
        self.turned = rotary_by_position(tuned.attention, tuned.latent, like, tuned.positions)
        self.places = torch.stack([tuned.positions, document_ids(tuned.positions)], dim=1)
        self.window = tuned.attention.sliding_window

    def __call__(self, blocks: list[int], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions, documents = self.places[blocks].unbind(1)
        cos, sin = self.turned(positions)
        return cos, sin, seen_keys(documents, rows, self.window)


def _tune(
    tuned: TunedLayer,
    chosen: TunableRows,
    loss: Callable[[list[int], Tensor], Tensor],
    steps: int,
    seed: int,
    progress: Callable[[], None],
) -> dict[str, float]:
    width = tuned.attention.o_proj.out_features

    def in_precision(blocks: list[int], rows: Tensor) -> Tensor:
        with precision(rows.device, tuned.dtype):
            return loss(blocks, rows)

    return tune(
        chosen,
        in_precision,
        tuned.positions,
        tuned.held_out,
        fan_in=width,
        steps=steps,
        seed=seed + 1000 * tuned.index,
        progress=progress,
    )


def _next_norm(tuned: TunedLayer) -> Any:
    """What the layer's output passes next: the following layer's norm, or the decoder's.

    Errors are measured behind it, as that layer sees them. Before it, the few channels and tokens of huge activation
    that most models have would drown the rest.
    """
    if tuned.index + 1 == len(tuned.original.layers):
        return final_norm(tuned.original)
    return first_norm(tuned.original, tuned.index + 1)


def key_parameters(attention: Any) -> TunableRows:
    """What makes narrow queries and keys of a latent attention: its maps behind a QK-norm, or projections and norms."""
    if attention.q_map is not None:
        maps = (attention.q_map, attention.k_map)
        return [(each, slice(None)) for each in maps if each is not None]
    norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    return [
        *(attention.parameters_of("q") + attention.parameters_of("k")),
        *((parameter, slice(None)) for norm in norms for parameter in norm.parameters()),
    ]


def value_parameters(attention: Any) -> TunableRows:
    """What makes narrow values of a latent attention and reads them out."""
    readers = [*attention.o_proj.parameters(), *([] if attention.v_map is None else [attention.v_map])]
    outputs = [(parameter, slice(None)) for parameter in readers]
    return outputs + attention.parameters_of("v")
