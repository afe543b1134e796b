"""Which device and dtype a job runs in."""

from __future__ import annotations

import torch

__all__ = ["choose_device", "working_dtype"]


def choose_device(device: str) -> str:
    """`auto` is CUDA where torch sees one, else the CPU.

    Raises:
        ValueError: another name, or CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda: got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for but torch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def working_dtype(dtype: str, device: str) -> str:
    """Dtype that weights are held in: fp32 on the CPU, where autocast does the rest; the recipe's on a GPU."""
    return "float32" if device == "cpu" else dtype
