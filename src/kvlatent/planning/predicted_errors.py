"""What narrower keys and values are predicted to cost: two error curves per layer, from the calibration statistics.

Both are squared errors of the attention output over its energy, so that they can be added, and compared with what
another width would cost. To first order, and before the output refit: good for choosing, not a perplexity.

Shapes: L layers, P channel pairs, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlatent.selection.pairs import key_errors
from kvlatent.selection.statistics import Statistics

__all__ = ["ALIGNED_SHARE", "MEASURED", "PREDICTED", "LayerErrors", "measured_errors", "predicted_errors"]

PREDICTED, MEASURED = "relative squared error", "nats a token"
"""Units of the errors of a layer: of its attention output, or of what the whole model predicts."""

_TINY = 1e-6  # nats: the divergence of rounding

ALIGNED_SHARE = 0.5
"""What alignment leaves of the key error that the statistics predict, as far as the split is concerned; measured, not
derived: with it the plan is at or next to the best split found on both models of docs/log.md (2026-11-22)."""


@dataclass(frozen=True)
class LayerErrors:
    """What a narrower side costs, by layer: relative squared error of the attention output, or a measured divergence.

    Args:
        keys: [L, P + 1], at 0 ... P kept channel pairs (d_qk is twice that).
        values: [L, d + 1], at 0 ... d kept value channels.
        table: scope of the rotary table.
        aligned: whether `keys` counts on attention alignment.
        unit: what they are, `PREDICTED` or `MEASURED`.
    """

    keys: Tensor
    values: Tensor
    table: str
    aligned: bool
    unit: str = PREDICTED


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


def measured_errors(
    divergences: Mapping[str, Mapping[int, Sequence[float]]], head_dim: int, table: str
) -> LayerErrors:
    """Error curves through what was measured, in nats a token: straight lines of the logarithm, 0 at full width.

    Args:
        divergences: by side ("keys", "values"), width and layer, two widths at least; see `narrow_divergences`.
        head_dim: original head width.
        table: scope of the rotary table that they were measured with.
    """
    keys, values = (_curves(divergences[side], head_dim) for side in ("keys", "values"))
    return LayerErrors(keys[:, ::2], values, table, aligned=False, unit=MEASURED)


def _curves(measured: Mapping[int, Sequence[float]], head_dim: int) -> Tensor:
    """[L, d + 1]; beyond the widths that were measured the nearest line goes on."""
    widths = sorted(measured)
    logs = (
        torch.tensor([measured[width] for width in widths], dtype=torch.float64).clamp_min(_TINY).log()
    )  # [W, L]
    channels = torch.arange(head_dim + 1, dtype=torch.float64)
    right = torch.searchsorted(torch.tensor(widths, dtype=torch.float64), channels).clamp(1, len(widths) - 1)
    low, high = (torch.tensor(widths, dtype=torch.float64)[index] for index in (right - 1, right))
    share = ((channels - low) / (high - low))[:, None]
    curves = (logs[right - 1] + share * (logs[right] - logs[right - 1])).exp().T
    curves[:, -1] = 0.0
    return curves
