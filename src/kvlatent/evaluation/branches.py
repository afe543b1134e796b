"""Sequences that begin alike, read at once: what they share is one stretch, and their ends branch off from it.

A shuffled span is told from the true one by two dozen tokens behind hundreds that are the same. Read one by one, the
same tokens are computed again for every end. Here the ends lie behind each other, at the positions that they would have
had, and the attention mask keeps them apart: every end sees what is shared and itself.

Shapes: G groups, n ends of each, p shared tokens, e tokens of an end, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import FAMILIES, LATENT_PREFIX

__all__ = ["additive_mask", "can_branch", "read_branches", "table_switch"]

_WITH_MASKS = ("sdpa", "eager")  # attention that takes a mask of our own


def can_branch(model: Any) -> bool:
    """Whether a model's attention takes a mask, sees the whole context in every layer, and turns by one table."""
    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation not in _WITH_MASKS:
        return False
    family = FAMILIES.get(str(model.config.model_type).removeprefix(LATENT_PREFIX))
    if family is None or table_switch(model.config) < math.inf:
        return False
    layers = family.attention_layers(model.config)
    if len(layers) < model.config.num_hidden_layers:  # the others read every token in turn, whatever the mask
        return False
    return all(family.sliding_window(model.config, layer) is None for layer in layers)


def table_switch(config: Any) -> float:
    """Length beyond which longrope turns everything in a batch by its other table; infinity without longrope."""
    if getattr(config, "kv_latent", None):
        return latent_config_of(config).tables[0][0].switch or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that every attention implementation adds to its logits: 0 where `seen`, the most negative number elsewhere."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def read_branches(model: Any, shared: Tensor, ends: Tensor) -> Tensor:
    """Logits at every token of every end, [G, n, e, V], as of sequences that are read one by one.

    Args:
        model: one that `can_branch`, in evaluation mode.
        shared: ids [G, p].
        ends: ids [G, n, e].
    """
    (groups, number, length), start = ends.shape, shared.shape[1]
    own = torch.arange(number, device=ends.device).repeat_interleave(length)
    branch = torch.cat([own.new_full((start,), -1), own])  # -1: shared
    place = torch.arange(length, device=ends.device).repeat(number) + start
    positions = torch.cat([torch.arange(start, device=ends.device), place])
    seen = (branch[None] == branch[:, None]) | (branch[None] == -1)
    seen &= positions[None] <= positions[:, None]
    mask = additive_mask(seen[None, None], model.dtype)
    output = model(
        input_ids=torch.cat([shared, ends.flatten(1)], dim=1),
        position_ids=positions.expand(groups, -1),
        attention_mask=mask.expand(groups, -1, -1, -1),
        use_cache=False,
        logits_to_keep=number * length,
    )
    return output.logits[:, -number * length :].unflatten(1, (number, length))
