"""One layer of a decoder, original or latent, by its parts; what stands around its attention stays upstream's own code.

A layer is run with its attention's output given, so that residuals, norms behind the attention, multipliers and experts need
no code of ours.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import Tensor, nn

from kvlatent.model.families import family_of
from kvlatent.model.rotary import LatentRotary
from kvlatent.model.table import RotaryTable

__all__ = [
    "LayerParts",
    "carried_share",
    "final_norm",
    "first_norm",
    "layer_output",
    "parts_of",
    "rotary_of_decoder",
    "windows_of",
]


class LayerParts(NamedTuple):
    """Modules of one layer, whatever its family calls them; `attention_norm` passes everything where there is none."""

    attention: Any
    attention_norm: Any
    ffn: Any


def parts_of(decoder: Any, layer: int) -> LayerParts:
    """The modules of a layer of a decoder.

    Raises:
        ValueError: the family's row names a module that is not there.
    """
    family, module = family_of(decoder.config), decoder.layers[layer]
    found = []
    for part in LayerParts._fields:
        name = getattr(family, part)
        if name and not hasattr(module, name):
            raise ValueError(family.missing(f"the module {name!r} ({part}) in a {type(module).__name__}"))
        found.append(getattr(module, name) if name else nn.Identity())
    return LayerParts(*found)


def first_norm(decoder: Any, layer: int) -> Any:
    """What a layer's input passes first, with attention or without."""
    name = family_of(decoder.config).attention_norm
    return getattr(decoder.layers[layer], name) if name else nn.Identity()


def final_norm(decoder: Any) -> Any:
    """The norm behind the last layer."""
    family = family_of(decoder.config)
    if not hasattr(decoder, family.final_norm):
        raise ValueError(
            family.missing(f"the module {family.final_norm!r} (final_norm) in a {type(decoder).__name__}")
        )
    return getattr(decoder, family.final_norm)


def rotary_of_decoder(decoder: Any) -> Any:
    """The module that turns positions into cosines and sines, or, where layers have tables of their own, gives them positions."""
    name = family_of(decoder.config).rotary
    return getattr(decoder, name) if name else LatentRotary((RotaryTable(()),))


def layer_output(decoder: Any, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
    """What a layer puts out for its input [B, T, D] where its attention puts out `attended` [B, T, D]."""
    shell = copy.copy(decoder.layers[layer])
    shell._modules = shell._modules | {family_of(decoder.config).attention: _Given(attended)}
    output = shell(hidden, attention_mask=None, position_embeddings=None)
    return output[0] if isinstance(output, tuple) else output


def windows_of(model: Any) -> list[int | None]:
    """Sliding window of every layer of a model that has attention, in tokens, or None."""
    family = family_of(model.config)
    return [family.sliding_window(model.config, layer) for layer in family.attention_layers(model.config)]


def carried_share(config: Any) -> float:
    """How much of an error of the residual stream the attention's output has to be moved by to make up for it.

    1 where it is added as it is, one over its multiplier, and 0 where a norm stands between them: there the output is
    only brought back to the original's.
    """
    family = family_of(config)
    return 0.0 if family.norms_output else 1 / family.number(config, "residual_multiplier")


class _Given(nn.Module):
    """In the place of an attention, with its output known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.output, None
