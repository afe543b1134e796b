"""Stage I, in-layer distillation: pull every latent layer back towards the original layer (paper 3.2.2).

Why: each layer is fed the *original's* input, so no error travels from layer to layer, no gradient crosses a
layer boundary and no LM head is computed; a step costs about one original forward plus one latent forward and
backward.

The student runs its own forward (its own masks and rotary tables), hooks only swap what enters a layer and
read what leaves it. So there is no code per family, and the call goes through the root module, as DDP and
FSDP need. `layer_losses_one_at_a_time` differentiates a layer as soon as it has run, so one layer's graph is alive and no
state is kept; `capture` and `layer_losses` hold the states and graphs of all layers until the backward pass, which is
when FSDP gathers the weights that gradients go through.

Late in the stage a layer can be fed what the student's own layers below it gave (`own_stream`), its target still being the
original's stream: so it learns to make up for the error that reaches it, as a conversion's refit does, where a target
computed from its own input would only have it imitate the original's layer there and pass that error on.

Legend: `B` batch, `T` positions, `D` model width, `L` layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.model.hidden_states import embed, isolate_layer

__all__ = ["capture", "layer_losses", "layer_losses_one_at_a_time", "layers_of", "squared_error"]


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
    layers = layers_of(teacher_base)

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


def layer_losses(
    student_base: nn.Module,
    captured: list[Tensor],
    batch: Mapping[str, Tensor],
    *,
    own_stream: bool = False,
) -> Tensor:
    """Squared error of every layer's output, per token and channel, given the original's input (paper eq. 6
    and 7).

    The paper prints an unsquared norm but calls it MSE; the squared form is used. Each entry depends on the
    parameters of its own layer only.

    Args:
        student_base: the latent decoder, or a DDP or FSDP wrapper of it.
        captured: what `capture` returned for the same batch.
        batch: as for `capture`.
        own_stream: feed each layer what the student's layers below it gave, without gradient, instead of the original's
            input; the targets stay.

    Returns:
        [L] in fp32, the mean over all B x T tokens and D channels; 0 exactly where the layer is the
        original's.

    Raises:
        ValueError: `captured` does not hold one tensor more than the student has layers.
    """
    layers = layers_of(student_base)
    if len(captured) != len(layers) + 1:
        raise ValueError(
            f"stage I needs one captured state more than the student has layers: got {len(captured)} states "
            f"for {len(layers)} layers; capture them from the original of this student"
        )
    losses: list[Tensor] = []
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            if not own_stream:
                feed = _feed(captured[index])
                hooks.callback(layer.register_forward_pre_hook(feed, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(_compare(captured[index + 1], losses)).remove)
        _run(student_base, batch)
    return torch.stack(losses)


def layer_losses_one_at_a_time(
    student_base: nn.Module, teacher_base: Any, batch: Mapping[str, Tensor], *, own_stream: bool = False
) -> Tensor:
    """The losses and gradients of `layer_losses`, with one layer's graph alive at a time and no state kept.

    Each layer's gradients are computed when it has run and handed on when the returned losses are differentiated, by which
    DDP and accumulation see them as ever. They are computed as those of the mean over layers, so of that they are the same
    to the bit.

    Args:
        student_base: the latent decoder, or a DDP wrapper of it; not one whose parameters are sharded.
        teacher_base: the original's decoder, on the same device.
        batch, own_stream: as for `layer_losses`.
    """
    layers = layers_of(student_base)
    losses: list[Tensor] = []
    inputs = _inputs(batch)
    with torch.no_grad():
        states = {"leaving": embed(teacher_base, inputs.pop("input_ids"))}  # of what is below the first layer
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(
                layer.register_forward_pre_hook(
                    _step_original(teacher_base, index, inputs, states, own_stream), with_kwargs=True
                ).remove
            )
            hooks.callback(layer.register_forward_hook(_differentiate(states, losses, len(layers))).remove)
        _run(student_base, batch)
    return torch.stack(losses)


def _step_original(
    teacher_base: Any, index: int, inputs: dict[str, Tensor], states: dict[str, Tensor], own_stream: bool
) -> Any:
    """A pre-hook that takes the original one layer further and, but for `own_stream`, feeds the student what entered it."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        state = states["leaving"]
        with torch.no_grad():
            layer = isolate_layer(teacher_base, index)
            states["leaving"] = layer(inputs_embeds=state, **inputs, use_cache=False).last_hidden_state
        return None if own_stream else _feed(state)(module, args, kwargs)

    return hook


def _differentiate(states: dict[str, Tensor], losses: list[Tensor], num_layers: int) -> Any:
    """A hook that appends a layer's loss, its gradients computed, and passes its output on without a graph."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        loss = squared_error(output, states["leaving"])
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):
                share = torch.ones_like(loss) / num_layers
                gradients = torch.autograd.grad(loss, trained, share, allow_unused=True)
            loss = _Differentiated.apply(loss.detach(), share, gradients, *trained)
        losses.append(loss)
        return _detached(output)

    return hook


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients to some parameters are known, where its own gradient is `share`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor, gradients: tuple, *trained: Tensor) -> Tensor:
        ctx.share, ctx.gradients = share, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        factor = outer[0] / ctx.share
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if one is None else one.mul_(factor) for one in gradients)


def _feed(state: Tensor) -> Any:
    """A pre-hook that replaces a layer's input by `state`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    return hook


def _compare(target: Tensor, losses: list[Tensor]) -> Any:
    """A hook that appends a layer's mean squared error against `target`, in fp32, and cuts the graph behind it."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        losses.append(squared_error(output, target))
        return _detached(output)

    return hook


def squared_error(output: Any, target: Tensor) -> Tensor:
    """Mean squared error of a layer's output against `target`, [B, T, D], in fp32."""
    return (_first(output).float() - target.float()).square().mean()


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}


def _run(base: nn.Module, batch: Mapping[str, Tensor]) -> None:
    base(**_inputs(batch), use_cache=False)


def layers_of(base: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, or of what wraps it."""
    layers = getattr(base, "module", base).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _detached(output: Any) -> Any:
    return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
