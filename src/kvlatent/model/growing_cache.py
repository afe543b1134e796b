"""Cache layers that write a new token into room they already have.

transformers' dynamic cache joins old and new tensors at every token, which on a CPU moves the whole cache to write a line
of it. These layers hold keys and values in tensors with an eighth more room and hand out views of what is filled. Their
contract is upstream's, and wherever something else put other tensors in, they take those up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["GrowingLayer", "GrowingSlidingWindowLayer", "grow_in_place"]

_LEAST_ROOM = 32


def grow_in_place(cache: Any, layer_idx: int, states: Tensor) -> None:
    """Exchange a layer of a plain dynamic cache for one that grows in place, keeping what it holds.

    Nothing happens to other caches, and on other devices, whose copies are fast and whose memory is dear.

    Args:
        cache: a transformers cache, or None.
        layer_idx: which layer is about to be updated.
        states: what it is updated with.
    """
    if type(cache) is not DynamicCache or cache.offloading or not _writes_in_place(states):
        return
    if layer_idx == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(GrowingLayer())
    elif layer_idx < len(cache.layers):
        layer = cache.layers[layer_idx]
        kind = {
            DynamicLayer: GrowingLayer,
            DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
        }.get(type(layer))
        if kind is not None:
            cache.layers[layer_idx] = kind.__new__(kind)
            vars(cache.layers[layer_idx]).update(vars(layer))


def _writes_in_place(states: Tensor) -> bool:
    """Not where a gradient would need the old tensors, and not where a compiler or a tracer looks on."""
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return states.device.type == "cpu" and not torch.is_grad_enabled() and not is_recorded


def _extend(room: Tensor | None, held: Tensor | None, new: Tensor) -> tuple[Tensor | None, Tensor]:
    """`held` and then `new` along the tokens, as a view of the first tensor that is returned.

    Args:
        room: what an earlier call returned; None at first.
        held: [B, K, S, width], a view of `room` or any other tensor; None or empty at first.
        new: [B, K, T, width].
    """
    if held is None or held.numel() == 0:
        held = new[..., :0, :]
    if held.dtype != new.dtype:
        return None, torch.cat([held, new], dim=-2)
    length = held.shape[-2]
    total = length + new.shape[-2]
    start = None if room is None else _start(room, held)
    if room is None or start is None or start + total > room.shape[-2]:
        room = new.new_empty(*new.shape[:-2], total + max(_LEAST_ROOM, total // 8), new.shape[-1])
        room[..., :length, :] = held
        start = 0
    room[..., start + length : start + total, :] = new
    return room, room[..., start : start + total, :]


def _start(room: Tensor, held: Tensor) -> int | None:
    """The token of `room` at which its view `held` begins; None if it is no such view, or must not be written to."""
    same_memory = held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    if not same_memory or held.stride() != room.stride() or held.shape[:2] != room.shape[:2]:
        return None
    if room.is_inference() and not torch.is_inference_mode_enabled():
        return None
    return (held.storage_offset() - room.storage_offset()) // room.stride(-2)


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` whose update writes the new tokens only; the room is enlarged by an eighth when it is full."""

    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As upstream's: all keys [B, K, S, d_qk] and values [B, K, S, d_vo], here views that the next update extends."""
        if not _writes_in_place(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = _joined(self, key_states, value_states)
        return self.keys, self.values


class GrowingSlidingWindowLayer(DynamicSlidingWindowLayer):
    """`DynamicSlidingWindowLayer` whose update writes the new tokens only, and moves the window when its room is full."""

    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As upstream's: what the new tokens may see; kept are the last window - 1 of it."""
        # Recording the past, for assisted decoding, is upstream's; what it leaves is taken up afterwards.
        if not _writes_in_place(key_states) or getattr(self, "record_past", False):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = _joined(self, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = (x[:, :, -self.sliding_window + 1 :, :] for x in (keys, values))
        return keys, values


def _joined(layer: Any, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """What `layer` holds and the new states, written into its rooms."""
    if not layer.is_initialized:
        layer.lazy_initialization(key_states, value_states)
    key_room, keys = _extend(layer._rooms[0], layer.keys, key_states)
    value_room, values = _extend(layer._rooms[1], layer.values, value_states)
    layer._rooms = key_room, value_room
    return keys, values
