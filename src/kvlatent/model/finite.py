"""That weights are numbers: one NaN or infinity makes every figure of a model worthless, and no step after it says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_finite_weights", "first_not_finite"]


def check_finite_weights(model: Any, name: str = "the model") -> None:
    """Raise `ValueError`, naming the tensor, where a parameter of `model` (which users call `name`) is not finite.

    One pass over the weights, which needs no memory of their size.
    """
    broken = first_not_finite(model.named_parameters())
    if broken is None:
        return
    tensor = model.get_parameter(broken)
    bad = int((~torch.isfinite(tensor.detach())).sum())
    raise ValueError(
        f"weights must be finite: {name} has NaN or infinity in {bad:,} of the {tensor.numel():,} numbers of {broken} "
        f"({str(tensor.dtype).removeprefix('torch.')}); download or make it again, or load it in a dtype that holds its "
        "numbers"
    )


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first floating-point tensor with NaN or infinity in it, or None."""
    for name, tensor in tensors:
        measurable = tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta
        # The extremes of a tensor are NaN where anything in it is.
        if measurable and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            return name
    return None
