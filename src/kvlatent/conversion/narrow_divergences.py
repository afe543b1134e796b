"""What narrow keys or narrow values cost the whole model, measured end to end: of all layers, or of each alone.

The statistics predict an error of a layer's output, and not every layer's output matters as much, nor a key's error as
much as a value's. Here one side is made narrow, at a few widths and from the closed form, and the model says what it
predicts then. For layers by themselves one pass gives what enters each, so that only those from there on are run again.

Shapes: L layers, B blocks, T positions, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.devices import faster_dtype, precision
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Stage2
from kvlatent.model.assembly import full_width
from kvlatent.model.families import attention_layers_of, family_of
from kvlatent.model.head import Head
from kvlatent.model.hidden_states import with_layers
from kvlatent.model.layer_parts import parts_of, rotary_of_decoder
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.model.rotary import LatentRotary
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics
from kvlatent.text.recall_blocks import held_out_blocks

__all__ = ["SIDES", "narrow_divergences", "work_of_widths"]

SIDES = ("keys", "values")
# Widths to measure, in eighths of a head; between them curves are close to exponential.
_EIGHTHS = (2, 3, 4, 6)
_TOKENS = 2048


@torch.no_grad()
def narrow_divergences(
    model: Any,
    statistics: Statistics,
    choices: Choices,
    *,
    per_layer: bool = True,
    qk_norm: str = "full",
    progress: Progress | None = None,
) -> dict[str, dict[int, list[float]]]:
    """KL(original || model with one narrow side), nats a token, by side, width and layer.

    Args:
        model: the original; it is left as it was.
        statistics: of `model`; about 2,048 tokens of their held-out blocks are looked at.
        choices: of the conversion; nothing is tuned here. qk_norm: see `choose`.
        per_layer: one layer is narrow at a time; otherwise all are.
        progress: told after every measurement.

    Returns:
        {"keys": {width: L numbers, or one where all layers are narrow}, "values": likewise}, at a few widths below the
        head's.
    """
    closed_form = replace(choices, refit=False, align=0, global_steps=0)
    head_dim, layers = statistics.head_dim, len(statistics.layers)
    widths = _widths(head_dim)
    each = layers if per_layer else 1
    step = Progress.of(progress).step("measure narrow sides", len(SIDES) * len(widths) * each)
    rest = _Rest(model, statistics)
    found: dict[str, dict[int, list[float]]] = {side: {} for side in SIDES}
    for side, width in ((side, width) for side in SIDES for width in widths):
        narrow = convert(
            model,
            d_qk=width if side == "keys" else None,
            d_vo=width if side == "values" else None,
            choices=closed_form,
            qk_norm=qk_norm,
            statistics=statistics,
        )
        numbers = attention_layers_of(model.config)
        attention = {index: _with_table(narrow.get_decoder(), index) for index in numbers}
        found[side][width] = []
        for index in numbers[:each]:
            replaced = {index: attention[index]} if per_layer else attention
            found[side][width].append(rest.divergence(index, replaced))
            step.advance()
    return found


def work_of_widths(
    layers: int, head_dim: int, blocks: int, size: int, *, per_layer: bool
) -> tuple[int, float]:
    """How many conversions `narrow_divergences` makes, and how many tokens its models read, as if all layers were run.

    Args:
        blocks: of the text, of `size` tokens each.
    """
    conversions = len(SIDES) * len(_widths(head_dim))
    tokens = len(_blocks(blocks, size)) * size
    # Of a layer by itself, those from it on are run: half of them in the mean.
    return conversions, conversions * tokens * (layers / 2 if per_layer else 1)


def _widths(head_dim: int) -> list[int]:
    return sorted({max(2, head_dim * eighths // 8 // 4 * 4) for eighths in _EIGHTHS})


def _blocks(count: int, size: int) -> list[int]:
    """Which of so many blocks are looked at."""
    return held_out_blocks(count)[: max(1, _TOKENS // size)] or [0]


def _with_table(decoder: Any, index: int) -> nn.Module:
    """The attention of a layer, with the rotary table that it shares with others as its own."""
    attention = parts_of(decoder, index).attention
    if attention.rotary is not None:
        return attention
    attention = copy.copy(attention)
    # Not registered as a module: that would write into the layer's own.
    attention.__dict__["rotary"] = rotary_of_decoder(decoder)
    return attention


class _Rest:
    """The original as its full-width twin, what enters each of its layers on some blocks, and what it puts out."""

    def __init__(self, model: Any, statistics: Statistics) -> None:
        self.twin = full_width(model).eval().requires_grad_(False)
        head = Head.of_model(model)
        self.head = head._replace(weight=head.weight.detach())
        self.dtype = faster_dtype(model.config, model.device)
        count, size = statistics.input_ids.shape
        chosen = _blocks(count, size)
        self.ids, self.positions = (
            t[chosen].long().to(model.device) for t in (statistics.input_ids, statistics.position_ids)
        )
        self.inputs: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0]))
            for layer in self.twin.get_decoder().layers
        ]
        with precision(model.device, self.dtype):
            output = self.twin.get_decoder()(input_ids=self.ids, position_ids=self.positions, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.final = output.last_hidden_state

    def divergence(self, index: int, attention: Mapping[int, nn.Module]) -> float:
        """With other attention in some layers, by number, the first of them `index`: mean KL from the original a token."""
        decoder = self._from_layer(index, attention)
        with precision(self.ids.device, self.dtype):
            hidden = decoder(
                inputs_embeds=self.inputs[index], position_ids=self.positions, use_cache=False
            ).last_hidden_state
            return float(
                stage2_loss(hidden, self.head, self.ids, Stage2(objective="kl"), self.final, self.head)
            )

    def _from_layer(self, index: int, attention: Mapping[int, nn.Module]) -> Any:
        """The decoder from one layer on, with other attention in the layers that are named."""
        decoder = self.twin.get_decoder()
        layers = [copy.copy(layer) for layer in decoder.layers[index:]]
        for number in (number for number in attention_layers_of(decoder.config) if number >= index):
            module = attention[number] if number in attention else _with_table(decoder, number)
            layer = layers[number - index]
            layer._modules = layer._modules | {family_of(decoder.config).attention: module}
        shell = with_layers(decoder, layers, index)
        # So that layers get positions, each for its own table.
        if rotary := family_of(shell.config).rotary:
            setattr(shell, rotary, LatentRotary(()))
        return shell
