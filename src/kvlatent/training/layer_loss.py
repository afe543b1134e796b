"""Stage I, in-layer distillation: pull every latent layer back towards the original layer (paper 3.2.2).

Why: each layer is fed the *original's* input, so no error travels from layer to layer, no gradient crosses a
layer boundary and no LM head is computed; a step costs about one original forward plus one latent forward and
backward.

The student runs its own forward (its own masks and rotary tables), hooks only swap what enters a layer and
read what leaves it. So there is no code per family, and the call goes through the root module, as DDP and
FSDP need.

Legend: `B` batch, `T` positions, `D` model width, `L` layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["capture", "layer_losses"]


def capture(teacher_base: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Run the original decoder once and keep the hidden states between its layers.

    Args:
        teacher_base: the original's decoder (`model.get_decoder()`), or a wrapper of it; it is left as it
            was.
        batch: `input_ids` and, if present, `position_ids` and `attention_mask`, each [B, T]; other keys are
            ignored.

    Returns:
        L+1 tensors [B, T, D] without gradient: the input of every layer, then the output of the last one.
    """
    states: list[Tensor] = []
    layers = _layers(teacher_base)

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(_hidden(args, kwargs))

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(_first(output))

    with torch.no_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
        hooks.callback(layers[-1].register_forward_hook(keep_output).remove)
        _run(teacher_base, batch)
    return states


def layer_losses(student_base: nn.Module, captured: list[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Squared error of every layer's output, per token and channel, given the original's input (paper eq. 6
    and 7).

    The paper prints an unsquared norm but calls it MSE; the squared form is used. Each entry depends on the
    parameters of its own layer only.

    Args:
        student_base: the latent decoder, or a DDP or FSDP wrapper of it.
        captured: what `capture` returned for the same batch.
        batch: as for `capture`.

    Returns:
        [L] in fp32, the mean over all B x T tokens and D channels; 0 exactly where the layer is the
        original's.

    Raises:
        ValueError: `captured` does not hold one tensor more than the student has layers.
    """
    layers = _layers(student_base)
    if len(captured) != len(layers) + 1:
        raise ValueError(
            f"stage I needs one captured state more than the student has layers: got {len(captured)} states "
            f"for {len(layers)} layers; capture them from the original of this student"
        )
    losses: list[Tensor] = []
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            feed, compare = _feed(captured[index]), _compare(captured[index + 1], losses)
            hooks.callback(layer.register_forward_pre_hook(feed, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(compare).remove)
        _run(student_base, batch)
    return torch.stack(losses)


def _feed(state: Tensor) -> Any:
    """A pre-hook that replaces a layer's input by `state`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    return hook


def _compare(target: Tensor, losses: list[Tensor]) -> Any:
    """A hook that appends a layer's mean squared error against `target`, in fp32."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        losses.append((_first(output).float() - target.float()).square().mean())

    return hook


def _run(base: nn.Module, batch: Mapping[str, Tensor]) -> None:
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
    base(**inputs, use_cache=False)


def _layers(base: nn.Module) -> nn.ModuleList:
    layers = getattr(base, "module", base).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
