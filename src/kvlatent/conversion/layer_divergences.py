"""What narrow keys or values of one layer alone cost the whole model, measured end to end.

The statistics predict an error of a layer's output, and not every layer's output matters as much. Here every layer is
made narrow by itself, at a few widths and from the closed form, and the rest of the model says what it predicts then.
One pass gives what enters every layer, so that only the layers from there on are run again.

Shapes: L layers, B blocks, T positions, D model width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.devices import faster_dtype, precision
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Stage2
from kvlatent.model.assembly import full_width
from kvlatent.model.families import family_of, parts_of
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics
from kvlatent.text.recall_blocks import held_out_blocks

__all__ = ["SIDES", "layer_divergences"]

SIDES = ("keys", "values")
_EIGHTHS = (
    2,
    3,
    4,
    6,
)  # widths to measure, in eighths of a head; between them curves are close to exponential
_TOKENS = 2048


@torch.no_grad()
def layer_divergences(
    model: Any,
    statistics: Statistics,
    choices: Choices,
    *,
    qk_norm: str = "full",
    progress: Progress | None = None,
) -> dict[str, dict[int, list[float]]]:
    """KL(original || model with one narrow side of one layer), nats a token, by side, width and layer.

    Args:
        model: the original; it is left as it was.
        statistics: of `model`; about 2,048 tokens of their held-out blocks are looked at.
        choices: of the conversion; nothing is tuned here. qk_norm: see `choose`.
        progress: told after every layer.

    Returns:
        {"keys": {width: L numbers}, "values": likewise}, at a few widths below the head's.
    """
    closed_form = replace(choices, refit=False, align=0, global_steps=0)
    head_dim, layers = statistics.head_dim, len(statistics.layers)
    widths = sorted({max(2, head_dim * eighths // 8 // 4 * 4) for eighths in _EIGHTHS})
    step = Progress.of(progress).step("measure layers", len(SIDES) * len(widths) * layers)
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
        found[side][width] = []
        for index in range(layers):
            found[side][width].append(rest.divergence(index, parts_of(narrow.model, index).attention))
            step.advance()
    return found


class _Rest:
    """The original as its full-width twin, what enters each of its layers on some blocks, and what it puts out."""

    def __init__(self, model: Any, statistics: Statistics) -> None:
        self.twin = full_width(model).eval().requires_grad_(False)
        self.head, self.dtype = model.get_output_embeddings(), faster_dtype(model.config, model.device)
        count, size = statistics.input_ids.shape
        chosen = held_out_blocks(count)[: max(1, _TOKENS // size)] or [0]
        self.ids, self.positions = (
            t[chosen].long().to(model.device) for t in (statistics.input_ids, statistics.position_ids)
        )
        self.inputs: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0]))
            for layer in self.twin.model.layers
        ]
        with precision(model.device, self.dtype):
            output = self.twin.model(input_ids=self.ids, position_ids=self.positions, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.final = output.last_hidden_state

    def divergence(self, index: int, attention: nn.Module) -> float:
        """With `attention` in the place of that of one layer: mean KL from the original a token."""
        decoder = self._from_layer(index, attention)
        with precision(self.ids.device, self.dtype):
            hidden = decoder(
                inputs_embeds=self.inputs[index], position_ids=self.positions, use_cache=False
            ).last_hidden_state
            return float(
                stage2_loss(hidden, self.head, self.ids, Stage2(objective="kl"), self.final, self.head)
            )

    def _from_layer(self, index: int, attention: nn.Module) -> Any:
        """The decoder from one layer on, that layer with another attention."""
        decoder = self.twin.model
        layer = copy.copy(decoder.layers[index])
        layer._modules = dict(layer._modules) | {family_of(decoder.config).attention: attention}
        shell = copy.copy(decoder)
        shell._modules = dict(decoder._modules)
        shell.layers = nn.ModuleList([layer, *decoder.layers[index + 1 :]])
        shell.config = copy.copy(decoder.config)
        shell.config.num_hidden_layers = len(shell.layers)
        if getattr(decoder.config, "layer_types", None) is not None:
            shell.config.layer_types = decoder.config.layer_types[index:]
        return shell
