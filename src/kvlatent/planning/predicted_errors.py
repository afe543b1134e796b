"""What narrower keys and values are predicted to cost: two error curves per layer, from the calibration statistics.

Both are squared errors of the attention output over its energy, so that they can be added, and compared with what
another width would cost. To first order, and before the output refit: good for choosing, not a perplexity.

Shapes: L layers, P channel pairs, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlatent.selection.pairs import key_errors
from kvlatent.selection.statistics import Statistics

__all__ = ["ALIGNED_SHARE", "LayerErrors", "predicted_errors"]

ALIGNED_SHARE = 0.5
"""What alignment leaves of the key error that the statistics predict, as far as the split is concerned; measured, not
derived: with it the plan is at or next to the best split found on both models of docs/log.md (2026-11-22)."""


@dataclass(frozen=True)
class LayerErrors:
    """Relative squared error of the attention output, by layer.

    Args:
        keys: [L, P + 1], at 0 ... P kept channel pairs (d_qk is twice that).
        values: [L, d + 1], at 0 ... d kept value channels.
        table: scope of the rotary table.
        aligned: whether `keys` counts on attention alignment.
    """

    keys: Tensor
    values: Tensor
    table: str
    aligned: bool


def predicted_errors(statistics: Statistics, table: str = "head", *, aligned: bool = True) -> LayerErrors:
    """Both error curves of every layer, relative to the energy of its attention output.

    Args:
        statistics: of the model.
        table: scope of the rotary table: who shares a set of key pairs.
        aligned: scale key errors by `ALIGNED_SHARE`.

    Raises:
        ValueError: a layer's output has no energy, or its statistics are not finite.
    """
    layers = statistics.layers
    energy = torch.stack([torch.as_tensor(layer.output_energy) for layer in layers]).double()
    values = torch.stack([layer.value_errors for layer in layers]).double()
    for index, layer in enumerate(layers):
        sound = layer.output_gram.isfinite().all() and values[index].isfinite().all()
        if not (sound and 0 < energy[index] < float("inf")):
            raise ValueError(
                "every layer's attention output needs finite statistics and an energy above 0: got energy "
                f"{float(energy[index]):g} in layer {index}; calibrate again, on other text"
            )
    keys = key_errors(statistics, table) / energy[:, None] * (ALIGNED_SHARE if aligned else 1.0)
    keys[:, -1] = 0.0  # a full width is left as it is; the search's jitter says a little more
    return LayerErrors(keys, values / energy[:, None], table, aligned)
