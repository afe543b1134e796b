"""From the closed-form start to the finished conversion: layer by layer, bottom up, each seeing what those below do.

For every layer: align its attention, refit W_O, align its output; then pass the text through it. The original runs
beside it, one layer at a time, and the states between layers lie on disk: memory is one layer, whatever the text.

Shapes: D model width, N query heads, T positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlatent.conversion.alignment import TunedLayer, align_attention, align_output, copy_for_tuning
from kvlatent.conversion.refit import refit_outputs
from kvlatent.jobs.progress import Progress, Step
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import parts_of
from kvlatent.model.hidden_states import HiddenStateFile, isolate_layer
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics

__all__ = ["refine"]

_HELD_OUT = 16  # one block in so many only measures


def refine(
    twin: Any,
    latent: Any,
    config: LatentConfig,
    statistics: Statistics,
    choices: Choices,
    *,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Align and refit `latent` in place, as `choices` say; sides at full width are left alone, bit for bit.

    Args:
        twin: the original as its full-width latent twin; latent: the converted model, with its closed-form start.
        config: of the latent model.
        statistics: the text to look at.
        seed: of the sampling.
        progress: told after every step of every layer; steps that a layer does not need count as done.

    Returns:
        One dict a layer: attention divergence and output error before and after, where aligned; the ridge of the refit.
    """
    ids, positions = (t.long().to(twin.device) for t in (statistics.input_ids, statistics.position_ids))
    blocks, size = ids.shape
    report = []
    each = 2 * choices.align + 1
    steps = progress.step("refine layers", each * len(twin.model.layers))
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder:
        streams = {
            name: HiddenStateFile(
                Path(folder) / name, (size, twin.config.hidden_size), twin.dtype, twin.device
            )
            for name in ("inputs", "outputs", "latent")
        }
        for name in ("inputs", "latent"):
            streams[name].write(twin.model.embed_tokens(ids[b, None]) for b in range(blocks))
        held = list(range(blocks))[_HELD_OUT - 1 :: _HELD_OUT] or ([blocks - 1] if blocks > 1 else [])
        for index in range(len(twin.model.layers)):
            steps.to(each * index)
            tuned = TunedLayer(
                index,
                twin.model,
                latent.model,
                copy_for_tuning(parts_of(latent.model, index).attention),
                streams["inputs"],
                streams["latent"],
                streams["outputs"],
                positions,
                held,
            )
            report.append(_refine_layer(tuned, config, choices, seed, steps))
            latent_layer = isolate_layer(latent.model, index)
            streams["latent"].write(_pass(latent_layer, streams["latent"], positions))
            streams["outputs"].path.replace(streams["inputs"].path)
    steps.to(steps.total)
    return report


def _refine_layer(
    tuned: TunedLayer, config: LatentConfig, choices: Choices, seed: int, steps: Step
) -> dict[str, Any]:
    """Align, refit, align; returns what alignment measured."""
    keys = config.d_qk_at(tuned.index) < config.original_head_dim
    values = config.d_vo_at(tuned.index) < config.original_head_dim
    wanted = HiddenStateFile(
        tuned.inputs.path.with_name("wanted"), tuned.inputs.shape, tuned.inputs.dtype, tuned.inputs.device
    )
    tuned.outputs.write(_original_pass(tuned, wanted))
    measured: dict[str, Any] = {"layer": tuned.index}
    if choices.align and keys:
        measured["attention_divergence"] = align_attention(tuned, choices.align, seed, steps.advance)
        _put_back(tuned)
    if choices.refit and values:
        measured["refit_ridge"] = refit_outputs(tuned, wanted)
        _put_back(tuned)
    if choices.align and (keys or values):
        measured["output_error"] = align_output(
            tuned, choices.align, seed + 1, steps.advance, keys=keys, values=values
        )
        _put_back(tuned)
    return measured


@torch.no_grad()
def _pass(layer: Any, inputs: HiddenStateFile, positions: Tensor) -> Iterator[Tensor]:
    """The outputs of one layer, block by block."""
    for block in range(len(positions)):
        output = layer(
            inputs_embeds=inputs.read([block]), position_ids=positions[block, None], use_cache=False
        )
        yield output.last_hidden_state


def _original_pass(tuned: TunedLayer, wanted: HiddenStateFile) -> Iterator[Tensor]:
    """The outputs of the original layer; `wanted` gets its input plus its attention's output, o + h, on the way."""
    caught: list[Tensor] = []
    hook = parts_of(tuned.original, tuned.index).attention.register_forward_hook(
        lambda module, args, output: caught.append(output[0])
    )
    wanted.path.unlink(missing_ok=True)
    try:
        for block, output in enumerate(
            _pass(isolate_layer(tuned.original, tuned.index), tuned.inputs, tuned.positions)
        ):
            wanted.append(tuned.inputs.read([block]) + caught.pop())
            yield output
    finally:
        hook.remove()


@torch.no_grad()
def _put_back(tuned: TunedLayer) -> None:
    """Give the latent layer the tuned parameters; a tensor that did not change stays the original's own."""
    module = parts_of(tuned.latent, tuned.index).attention
    for name, new in tuned.attention.named_parameters():
        parameter = module.get_parameter(name)
        value = new.detach().to(parameter.dtype)
        if not torch.equal(value, parameter):
            parameter.data = value.clone()
