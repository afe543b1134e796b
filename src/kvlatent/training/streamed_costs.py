"""What stage I takes, whole in memory and streamed, from the shapes alone; checked against runs in `docs/streaming.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from kvlatent.checkpoints.resident_layers import LatentLayers, ResidentLayers
from kvlatent.checkpoints.sharded import ShardedWeights
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.time_estimate import PROCESS_BYTES, StreamCosts, assumed_speed

__all__ = ["memory_to_train", "streamed_stage_costs"]

_COPIES = 4  # of what is trained, in float32: the weights, their gradients, and two sums of Adam
_ROOM = 1.2  # of the weights, for what is computed from them
_READ_AND_WRITTEN = 1e9  # bytes a second of a disk, both ways
_SAVED = 12  # widths D that a layer's graph saves a token beside its heads and the feed-forward part, norms in float32
_FORWARD_AND_BACKWARD = 3  # times the operations of a forward pass
_FORWARD_TOKENS = 2048  # of the original, read together on a CPU


def memory_to_train(
    student: ShardedWeights, original: ShardedWeights, recipe: Recipe, stored: torch.dtype
) -> float:
    """Bytes that stage I takes with both models in memory, roughly, when the original has been loaded beside the student."""
    held = torch.float32 if recipe.dtype == "float32" else stored
    attention = (name for name in student.names if ".self_attn." in name or ".attention." in name)
    trained = _COPIES * student.num_bytes(attention, torch.float32)
    return _ROOM * (student.num_bytes(dtype=held) + original.num_bytes(dtype=stored) + trained)


def streamed_stage_costs(
    original: ResidentLayers, student: LatentLayers, recipe: Recipe, stored: torch.dtype, *, size: int
) -> StreamCosts:
    """Of a stage I that streams its checkpoints.

    Args:
        stored: dtype of what is written.
        size: tokens in a block.
    """
    settings, config, family = recipe.stage1, student.config, original.family
    names = student.names_of(0)
    attention = _count(student, (name for name in names if f".{family.attention}." in name))
    frozen = _count(student, names) - attention
    wide = config.intermediate_size
    adapters = recipe.lora.rank * len(family.ffn_modules) * (config.hidden_size + wide)
    trained = attention + adapters
    tokens = settings.batch_size * size
    # Frozen weights as they are read, and in float32 where the stage computes in it; the first go when the second are there.
    widened = recipe.dtype == "float32" and student.dtype != torch.float32
    held = frozen * (4 if widened else student.dtype.itemsize) + _COPIES * 4 * trained
    shapes = (student.weights.shape(name) for name in names if f".{family.attention}." in name)
    heads = sum(shape[0] for shape in shapes if shape)
    # Gate, up, their product and its activation; LoRA's input is the layer's own.
    graph = tokens * 4 * (_SAVED * config.hidden_size + 2 * heads + 5 * wide)
    passing = _count(original, original.names_of(0)) * original.dtype.itemsize
    passing += min(tokens, _FORWARD_TOKENS) * 4 * 3 * wide
    steps = math.ceil(settings.tokens / (tokens * settings.gradient_accumulation))
    seen = steps * tokens * settings.gradient_accumulation
    states = original.dtype.itemsize * config.hidden_size
    own = 2 * round(settings.own_stream * steps) / steps
    operations = 2 * seen * (_FORWARD_AND_BACKWARD * (frozen + trained) + passing / original.dtype.itemsize)
    written = student.weights.num_bytes(dtype=stored)
    embedding = student.weights.num_bytes([student.embedding], stored)
    return StreamCosts(
        PROCESS_BYTES + max(held + graph, passing, embedding),
        written + seen * states * (2 + own),
        written / _READ_AND_WRITTEN
        + student.count * operations / assumed_speed(student.device, getattr(torch, recipe.dtype)),
    )


def _count(layers: ResidentLayers | LatentLayers, names: Iterable[str]) -> int:
    """Numbers in these tensors."""
    return layers.weights.num_bytes(names, torch.float32) // 4
