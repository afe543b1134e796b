"""The original as teacher: is it of the student's shape, and how do both fit on one device.

Why: the teacher is only read, so it is a view: separate parameter objects on the caller's tensors. What
student and teacher share stays one tensor when it moves to a GPU, so the teacher costs only its own attention
projections there.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .trainable import merged_copy, shared_copy

__all__ = ["check_teacher", "placed_teacher"]

_SAME = ("hidden_size", "num_hidden_layers", "vocab_size")


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Raise unless the teacher has the student's width, layers and vocabulary.

    Raises:
        ValueError: there is no teacher, or one of the three differs; both numbers are named.
    """
    if teacher is None:
        raise ValueError("this stage compares with the original model and got none; pass it as the teacher")
    for name in _SAME:
        own, other = getattr(student.config, name), getattr(teacher.config, name, None)
        if own != other:
            raise ValueError(
                f"the teacher must have the student's {name}: got {other} in the teacher and {own} in the student; "
                "pass the checkpoint that the student was converted from"
            )


def placed_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, dtype: str, device: torch.device
) -> PreTrainedModel:
    """Move the student to the device, in place, and give a frozen view of the teacher there, in evaluation
    mode.

    Args:
        student: prepared for training.
        teacher: left as it is, in values, type, place and mode.
        dtype: "float32" makes the view fp32; otherwise the teacher's types are kept.
        device: of the training.
    """
    cast = dtype == "float32"
    view = merged_copy(teacher, torch.float32) if cast else shared_copy(teacher).requires_grad_(False).eval()
    shared = {_place(parameter): parameter for parameter in student.parameters()}
    twins = [(own, shared[_place(own)]) for own in view.parameters() if _place(own) in shared]
    student.to(device)
    for own, twin in twins:
        own.data = twin.detach()
    return view.to(device)


def _place(tensor: torch.Tensor) -> tuple:
    """Where and what a tensor is; equal for two parameters on the same memory."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device
