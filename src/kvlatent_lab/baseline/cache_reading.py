"""Measuring through a cache: what is scored has been predicted from what a quantised cache gives back.

A forward pass over a whole text never reads a cache, so its quantisation would not show. Here every pass goes over the
text a stretch at a time; a stretch sees itself as it is and everything before it as the cache returns it, whose share
of unquantised tokens is nothing (transformers' default keeps up to 128).

Shapes: B batch, T query positions, S cached positions.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvlatent.evaluation.branches import additive_mask
from kvlatent.evaluation.speed.caches import make_cache

__all__ = ["read_through_cache"]

_SHORT, _LONG = (
    24,
    96,
)  # tokens of a stretch: multiples of 3 x 8, so that groups of heads stay aligned as a cache grows


@contextmanager
def read_through_cache(model: Any, kind: str) -> Generator[None]:
    """All forward passes of a model that bring no cache go through an empty one of that kind, a stretch at a time.

    Args:
        model: causal language model, original or latent; afterwards it is as it was.
        kind: of `evaluation.speed.caches`; "dynamic" changes nothing.
    """
    if kind == "dynamic":
        yield
        return
    decoder = model.get_decoder()
    whole = decoder.forward

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> Any:
        if past_key_values is not None or (attention_mask is not None and attention_mask.dim() != 4):
            raise ValueError(
                "a quantised cache is measured on whole texts without padding: got a mask of padding or a cache; leave "
                "them out"
            )
        given.pop("use_cache", None)
        length = input_ids.shape[1]
        cache = make_cache(kind, model.config, length)
        for layer in cache.layers:
            layer.residual_length = 1
        mask = attention_mask  # [B, 1, T, T], from who lays several texts into one row
        if mask is None and position_ids is not None:
            mask = additive_mask(document_mask(position_ids), model.dtype)
        parts = []
        for start in range(0, length, size := stretch(length)):
            end = min(length, start + size)
            output = whole(
                input_ids=input_ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :, start:end, :end],
                position_ids=None if position_ids is None else position_ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
                **given,
            )
            parts.append(output.last_hidden_state)
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(parts, dim=1), past_key_values=cache)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward


def stretch(length: int) -> int:
    """Tokens of a stretch of a text: a quarter of it, within bounds."""
    return max(_SHORT, min(_LONG, length // 4 // _SHORT * _SHORT))


def document_mask(positions: Tensor) -> Tensor:
    """Which tokens see which, bool [B, 1, T, T], where positions [B, T] that restart separate documents."""
    document = (positions[:, 1:] <= positions[:, :-1]).cumsum(1)
    document = torch.nn.functional.pad(document, (1, 0))
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=positions.device).tril()
