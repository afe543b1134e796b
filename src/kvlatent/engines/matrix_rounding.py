"""A model computed with matrices as coarse as an export stores them: what that type costs this model, before anything is written.

llama.cpp also rounds what it multiplies by a matrix to the matrix's type. On trained models in f16, bf16 and q8_0 it differed by
0.85 to 1.1 times what both roundings together make of our logits (docs/compatibility.md).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

__all__ = ["MatrixRounding", "relative_difference", "rounded"]

_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MatrixRounding:
    """How an engine rounds.

    Args:
        dtype: of the matrices, "f16", "bf16" or "q8_0".
        inputs: what is multiplied by a matrix is rounded likewise.
    """

    dtype: str
    inputs: bool

    @contextmanager
    def applied(self, model: nn.Module) -> Generator[None]:
        """Within it, the model computes so; its parameters are what they were, one rounded copy lives at a time."""
        kept: dict[nn.Module, Tensor] = {}

        def enter(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            kept[module] = module.weight.data
            module.weight.data = rounded(kept[module], self.dtype)
            has_numbers = self.inputs and isinstance(module, nn.Linear)
            return (rounded(given[0], self.dtype), *given[1:]) if has_numbers else given

        def leave(module: Any, given: tuple[Any, ...], output: Any) -> None:
            module.weight.data = kept.pop(module)

        handles = []
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, weight in kept.items():  # a forward pass that failed half-way
                module.weight.data = weight


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Float32 values [..., D] as they come back from a type; rows that are no whole blocks from float16, as they are written."""
    if dtype in _TORCH:
        return values.to(_TORCH[dtype]).float()
    kind = GGMLQuantizationType[dtype.upper()]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return values.half().float()
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values.detach().numpy(), kind), kind))


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean square difference, over the standard deviation of what is wanted."""
    return float((found - wanted).square().mean().sqrt() / wanted.std())
