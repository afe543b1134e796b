"""The last step of a conversion: all narrow projections at once, tuned on what the whole model predicts.

Goals that stop at a layer add up: thirty layers that each lose a little lose a lot together, and none of them knows what
the others can mend. Here the loss is the divergence of the next-token distribution from the original's (paper, equation
9), on the calibration text, without labels. Nothing but the narrow projections learns.

Shapes: B blocks, T positions, D model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.conversion.alignment import key_parameters, value_parameters
from kvlatent.conversion.tuning import BLOCKS, TunableRows, tune
from kvlatent.jobs.devices import precision
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Stage2
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of
from kvlatent.model.head import Head
from kvlatent.model.hidden_states import HiddenStates, blocks_at_once, hold_hidden_states
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.selection.statistics import Statistics
from kvlatent.text.recall_blocks import held_out_blocks

__all__ = ["blocks_of_a_step", "held_out_divergence", "tune_all_layers"]

_RATE = 0.12  # of what a layer alone takes: 2e-4 to 6e-3 on SmolLM2-135M, where a whole conversion at .5 came out worse
_TOKENS = 4096  # of a step at most: the activations of the whole model are held


def tune_all_layers(
    original: Any,
    latent: Any,
    config: LatentConfig,
    statistics: Statistics,
    *,
    steps: int,
    rate: float = _RATE,
    seed: int,
    dtype: str,
    progress: Progress,
) -> dict[str, float]:
    """Tune the narrow projections of `latent` in place on KL(original || latent) of the next token.

    Args:
        original, latent: causal language models, frozen, on one device; `config` is that of the latent one.
        statistics: the text to learn from.
        steps: at most so many, of four blocks or 4,096 tokens each; rate: times the rate that weights of their size take.
        seed: of the order of the blocks; dtype: of the products, "float32" or "bfloat16".
        progress: told after every step.

    Returns:
        Mean divergence a token, in nats, on held-out blocks "before" and "after".
    """
    ids, positions = (t.long().to(latent.device) for t in (statistics.input_ids, statistics.position_ids))
    held = held_out_blocks(len(ids))
    head, goal_head = Head.of_model(latent), Head.of_model(original)
    stored, dtype = latent.dtype, _product_dtype(latent, dtype)
    goal = Stage2(objective="kl")
    with scratch_folder() as folder:
        told = progress.step("tune all layers", steps)
        states = _final_states(original.get_decoder(), ids, positions, folder, dtype)

        def loss(blocks: list[int], rows: Tensor) -> Tensor:
            with precision(latent.device, dtype):
                hidden = latent.get_decoder()(
                    input_ids=ids[blocks], position_ids=positions[blocks], use_cache=False
                )
                return stage2_loss(
                    hidden.last_hidden_state, head, ids[blocks], goal, states.read(blocks), goal_head
                )

        chosen = _narrow_parameters(latent.get_decoder(), config)
        measured = tune(
            chosen,
            loss,
            positions,
            held,
            fan_in=latent.config.hidden_size,
            rate=rate,
            steps=steps,
            together=blocks_of_a_step(ids.shape[1]),
            seed=seed,
            progress=told.advance,
        )
    told.to(steps)  # it may have stopped early
    for parameter, _ in chosen:
        parameter.data = parameter.data.to(stored)
    return measured


def blocks_of_a_step(size: int) -> int:
    """How many blocks of so many tokens a step takes."""
    return max(1, min(BLOCKS, _TOKENS // size))


@torch.no_grad()
def held_out_divergence(original: Any, latent: Any, statistics: Statistics, *, dtype: str) -> float | None:
    """KL(original || latent) of the next token on the held-out blocks of `statistics`, nats; None without any.

    Args:
        original, latent, dtype: as for `tune_all_layers`, whose "before" and "after" are this number.
    """
    ids, positions = (t.long().to(latent.device) for t in (statistics.input_ids, statistics.position_ids))
    held = held_out_blocks(len(ids))
    heads, total = (Head.of_model(latent), Head.of_model(original)), 0.0
    for some in torch.tensor(held, dtype=torch.long).split(blocks_of_a_step(ids.shape[1])):
        with precision(latent.device, _product_dtype(latent, dtype)):
            hidden, wanted = (
                each.get_decoder()(input_ids=ids[some], position_ids=positions[some], use_cache=False)
                for each in (latent, original)
            )
            states = hidden.last_hidden_state, heads[0], ids[some], Stage2(objective="kl")
            total += float(stage2_loss(*states, wanted.last_hidden_state, heads[1])) * len(some)
    return total / len(held) if held else None


def _product_dtype(latent: Any, dtype: str) -> str:
    """Of the products: float32 weights meet activations of that dtype, others are in one already."""
    return dtype if latent.dtype == torch.float32 else str(latent.dtype).removeprefix("torch.")


@torch.no_grad()
def _final_states(decoder: Any, ids: Tensor, positions: Tensor, folder: Path, dtype: str) -> HiddenStates:
    """What the original's head reads of every block: [blocks, T, D]."""
    shape = (ids.shape[1], decoder.config.hidden_size)
    states = hold_hidden_states(folder / "final", shape, decoder.dtype, ids.device, len(ids), 1)
    for some in torch.arange(len(ids)).split(blocks_at_once(decoder, ids.shape[1])):
        with precision(ids.device, dtype):
            output = decoder(input_ids=ids[some], position_ids=positions[some], use_cache=False)
        states.append(output.last_hidden_state)
    return states


def _narrow_parameters(decoder: Any, config: LatentConfig) -> TunableRows:
    """The projections of every narrow side, made float32 parameters that are shared with nobody."""
    chosen: TunableRows = []
    for index in attention_layers_of(decoder.config):
        attention = parts_of(decoder, index).attention
        sides = ((key_parameters, config.d_qk_at(index)), (value_parameters, config.d_vo_at(index)))
        narrow = [parameters_of for parameters_of, width in sides if width < config.original_head_dim]
        for parameters_of in narrow:  # all before any is named: both sides may lie in one fused projection
            _separate(attention, [parameter for parameter, _ in parameters_of(attention)])
        chosen += [found for parameters_of in narrow for found in parameters_of(attention)]
    return chosen


def _separate(attention: Any, parameters: list[nn.Parameter]) -> None:
    """Put float32 copies in the place of these parameters of a module."""
    separated = {id(parameter) for parameter in parameters}
    for module in attention.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in separated:
                copy = parameter.detach().to(torch.float32, copy=True)
                setattr(module, name, nn.Parameter(copy, requires_grad=False))
