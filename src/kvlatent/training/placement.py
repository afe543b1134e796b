"""The original as teacher: is it of the student's shape, and how do both fit on one device.

Why: the teacher is only read, so it is a view: separate parameter objects on the caller's tensors. What
student and teacher have in common is one tensor, and stays one when it moves to a GPU, so the teacher costs only its own
attention projections.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kvlatent.model.families import head_dim_of, key_value_heads_of
from kvlatent.training.trainable import shared_copy

__all__ = ["SAME", "check_teacher", "place_teacher", "view_of_teacher"]

SAME = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "intermediate_size",
)
"""Sizes that an original shares with what was made of it."""


def check_teacher(student: PretrainedConfig, teacher: Any) -> None:
    """Raise unless the teacher can be the original of the student, as far as their configs tell.

    Args:
        student: config of the model that is trained.
        teacher: config of the original, or what a store says of it, or None where there is none.

    Raises:
        ValueError: there is no teacher, it is latent itself, or its architecture, a size or the head width differs
            from what the student was converted from; both values are named.
    """
    if teacher is None:
        raise ValueError("this stage compares with the original model and got none; pass it as the teacher")
    if getattr(teacher, "kv_latent", None):
        raise ValueError(
            f"the teacher must be the original model: got a latent one of type {teacher.model_type}; "
            "pass the checkpoint that the student was converted from"
        )
    pairs = [(name, getattr(student, name), getattr(teacher, name, None)) for name in SAME]
    pairs.append(("num_key_value_heads", key_value_heads_of(student), key_value_heads_of(teacher)))
    if latent := getattr(student, "kv_latent", None):
        pairs.append(("model_type", latent["original_model_type"], teacher.model_type))
        pairs.append(("head_dim", latent["original_head_dim"], head_dim_of(teacher)))
    for name, own, other in pairs:
        if own != other:
            raise ValueError(
                f"the teacher must have the student's {name}: got {other} in the teacher and {own} in the student; "
                "pass the checkpoint that the student was converted from"
            )


def place_teacher(
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
    view = view_of_teacher(student, teacher, dtype)
    shared = {_place(parameter): parameter for parameter in student.parameters()}
    twins = [(own, shared[_place(own)]) for own in view.parameters() if _place(own) in shared]
    student.to(device)
    for own, twin in twins:
        own.data = twin.detach()
    return view.to(device)


def view_of_teacher(student: PreTrainedModel, teacher: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The teacher, frozen, with the student's tensors wherever they hold the same numbers, whatever files they came from.

    So it costs its own attention projections, and the feed-forward part where the student's was trained before.

    Args:
        student, teacher, dtype: as for `place_teacher`; both models are in one place.
    """
    view = shared_copy(teacher).requires_grad_(False).eval()
    frozen = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in student.named_parameters()
        if not parameter.requires_grad
    }
    for name, own in view.named_parameters():
        wanted = own.to(torch.float32) if dtype == "float32" and own.is_floating_point() else own
        twin = frozen.get(name)
        same = twin is not None and _has_same_numbers(wanted, twin)
        own.data = twin.detach() if twin is not None and same else wanted.detach()
    return view


def _has_same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _place(tensor: torch.Tensor) -> tuple:
    """Where and what a tensor is; equal for two parameters on the same memory."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device
