"""What a streamed conversion will take, from the shape alone: memory, disk, and a guess at the time.

Memory is that of one layer while it is converted and does not go by the number of layers; disk and time do. Checked against
runs in `docs/streaming.md`.
"""

from __future__ import annotations

import torch

from kvlatent.checkpoints.resident_layers import ResidentLayers
from kvlatent.conversion.tuning import BLOCKS
from kvlatent.model.families import head_dim_of, key_value_heads_of
from kvlatent.model.time_estimate import PROCESS_BYTES, StreamCosts, assumed_speed
from kvlatent.model.widths import Widths, width_per_layer
from kvlatent.selection.choices import Choices

__all__ = ["stream_costs"]

_FORWARD_TOKENS = 2048  # read together on a CPU
_READ_AND_WRITTEN = 1e9  # bytes a second of a disk, both ways; a network's are less
_FFN = 4  # times the model width stand inside a feed-forward part where the config does not say
_BACKWARD = 3  # times the operations of a forward pass, with it
_ROWS = 128  # of a block, at which a step computes the feed-forward part
_PASSES = 3  # of all text through a layer: for statistics, for the targets, and converted
_TUNED_COPIES = (
    5  # of narrow attention in float32: the layer's, one that is tuned, its gradients, and two sums of Adam
)


def stream_costs(
    layers: ResidentLayers,
    widths: Widths,
    choices: Choices,
    stored: torch.dtype,
    *,
    blocks: int,
    size: int,
) -> StreamCosts:
    """Of a conversion to these widths.

    Args:
        layers: the original.
        stored: dtype of what is written.
        blocks, size: of the text, tokens in a block; 0 blocks where none is looked at.
    """
    config, head_dim, tokens = layers.config, head_dim_of(layers.config), blocks * size
    first, attending = layers.attending[0], len(layers.attending)
    mine = [name for name in layers.names_of(first) if name.startswith(layers.own(first))]
    one = torch.float32.itemsize
    whole = layers.weights.num_bytes(layers.names_of(first), torch.float32) / one
    attention = layers.weights.num_bytes(mine, torch.float32) / one
    kept = [
        (sum(width_per_layer(width, attending)) / (attending * head_dim))
        for width in (widths.d_qk, widths.d_vo)
    ]
    narrow = attention * sum(kept) / 2
    embedding = layers.weights.num_bytes([layers.embedding], stored)
    held = attention * layers.dtype.itemsize + whole * stored.itemsize + narrow * one
    operations = 0.0
    if tokens:
        between = getattr(config, "intermediate_size", None) or _FFN * config.hidden_size
        held = whole * (layers.dtype.itemsize + stored.itemsize) + _TUNED_COPIES * narrow * one
        held += 3 * min(tokens, _FORWARD_TOKENS) * between * one
        step = BLOCKS * (size * 2 * narrow + min(_ROWS, size) * (whole - attention))
        operations = 2 * (_PASSES * tokens * whole + _BACKWARD * choices.align * step)
    speed = assumed_speed(layers.device, layers.dtype)
    written = layers.weights.num_bytes(dtype=stored)
    # Seven streams at the most, and queries and keys while a layer is aligned.
    heads = config.num_attention_heads + key_value_heads_of(config)
    states = tokens * layers.dtype.itemsize * (7 * config.hidden_size + heads * head_dim)
    return StreamCosts(
        PROCESS_BYTES + max(held, embedding),
        written + states,
        written / _READ_AND_WRITTEN + layers.count * operations / speed,
    )
