"""From the closed-form start to the finished conversion: layer by layer, bottom up, each seeing what those below do.

For every layer: align its attention, refit W_O, align its output; then pass the text through it. The original runs
beside it, one layer at a time, and the states between layers lie on disk: memory is one layer, whatever the text.

Shapes: D model width, N query heads, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlatent.conversion.alignment import TunedLayer, align_attention, align_output, copy_for_tuning
from kvlatent.conversion.refit import refit_outputs
from kvlatent.jobs.devices import precision
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of
from kvlatent.model.hidden_states import (
    HiddenStates,
    blocks_at_once,
    embed,
    hold_hidden_states,
    isolate_layer,
)
from kvlatent.model.layer_parts import carried_share, parts_of
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.attention_rows import recorded_projections, rotary_of
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics
from kvlatent.text.recall_blocks import held_out_blocks

__all__ = ["carry_on", "layer_streams", "pass_original", "refine", "refine_layer"]


def refine(
    twin: Any,
    latent: Any,
    config: LatentConfig,
    statistics: Statistics,
    choices: Choices,
    *,
    seed: int,
    dtype: str,
    progress: Progress,
    layers: int | None = None,
) -> list[dict[str, Any]]:
    """Align and refit `latent` in place, as `choices` say; sides at full width are left alone, bit for bit.

    Args:
        twin: the original as its full-width latent twin; latent: the converted model, with its closed-form start.
        config: of the latent model.
        statistics: the text to look at.
        seed: of the sampling; dtype: of the products, "float32" or "bfloat16".
        progress: told after every step of every layer; steps that a layer does not need count as done.
        layers: only so many with attention, from the bottom; None: all.

    Returns:
        One dict a layer: attention divergence and output error before and after, where aligned; the ridge of the refit.
    """
    ids, positions = (t.long().to(twin.device) for t in (statistics.input_ids, statistics.position_ids))
    blocks, size = ids.shape
    report = []
    attending = attention_layers_of(twin.config)[:layers]
    each = 2 * choices.align + 1
    steps = progress.step("refine layers", each * len(attending))
    with scratch_folder() as folder:
        streams = layer_streams(folder, twin, blocks, size, dtype)
        for name in ("inputs", "latent"):
            streams[name].write(embed(twin.get_decoder(), ids[b, None]) for b in range(blocks))
        held = held_out_blocks(blocks)
        for index in range(attending[-1] + 1):
            steps.to(each * len(report))
            tuned = TunedLayer(
                index, twin.get_decoder(), latent.get_decoder(), None, streams, positions, held, dtype
            )
            last = each * (len(report) + 1)

            def advance(last: int = last) -> None:  # attempts at a lower rate are not counted
                steps.to(min(steps.done + 1, last))

            if index in attending:
                tuned.attention = copy_for_tuning(parts_of(latent.get_decoder(), index).attention)
                report.append(refine_layer(tuned, config, choices, seed, advance, streams["latent"]))
            else:
                carry_on(tuned.original, index, streams["inputs"], positions, streams["outputs"], dtype)
                carry_on(tuned.latent, index, streams["latent"], positions, streams["latent"], dtype)
            streams["inputs"], streams["outputs"] = streams["outputs"], streams["inputs"]
    steps.to(steps.total)
    return report


def layer_streams(folder: Path, twin: Any, blocks: int, size: int, dtype: str) -> dict[str, HiddenStates]:
    """Room for what flows between layers, and for the queries and keys of the original, in the dtype of the products."""
    first, hidden = attention_layers_of(twin.config)[0], twin.config.hidden_size
    attention = parts_of(twin.get_decoder(), first).attention
    widths = dict.fromkeys(("inputs", "outputs", "wanted", "latent"), (hidden, twin.dtype))
    for name, heads in (("queries", attention.num_heads), ("keys", attention.num_key_value_heads)):
        widths[name] = (heads * attention.d_qk, getattr(torch, dtype))
    return {
        name: hold_hidden_states(folder / name, (size, width), kind, twin.device, blocks, len(widths))
        for name, (width, kind) in widths.items()
    }


def refine_layer(
    tuned: TunedLayer,
    config: LatentConfig,
    choices: Choices,
    seed: int,
    advance: Callable[[], None],
    above: HiddenStates,
) -> dict[str, Any]:
    """Align, refit, align, then pass the text through; returns what alignment measured.

    Args:
        above: gets what the converted layer makes of its stream "latent", and may be that stream.
    """
    keys = config.d_qk_at(tuned.index) < config.original_head_dim
    values = config.d_vo_at(tuned.index) < config.original_head_dim
    pass_original(tuned, with_attention=bool(choices.align and keys))
    measured: dict[str, Any] = {"layer": tuned.index}
    if choices.align and keys:
        measured["attention_divergence"] = align_attention(tuned, choices.align, seed, advance)
        _put_back(tuned)
    if choices.refit and values:
        measured["refit_ridge"] = refit_outputs(tuned)
        _put_back(tuned)
    if choices.align and (keys or values):
        measured["output_error"] = align_output(
            tuned, choices.align, seed + 1, advance, keys=keys, values=values
        )
        _put_back(tuned)
    _pass_latent(tuned, above)
    return measured


def _pass_latent(tuned: TunedLayer, above: HiddenStates) -> None:
    """Pass the converted model's stream through its layer as it is now."""
    carry_on(tuned.latent, tuned.index, tuned.streams["latent"], tuned.positions, above, tuned.dtype)


def carry_on(
    decoder: Any, index: int, below: HiddenStates, positions: Tensor, above: HiddenStates, dtype: str
) -> None:
    """Pass a stream through a layer of `decoder` as it is now, with or without attention; `above` may be `below`."""
    above.write(output for _, _, output in _pass(decoder, index, below, positions, dtype))


@torch.no_grad()
def _pass(
    decoder: Any, index: int, below: HiddenStates, positions: Tensor, dtype: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs [b, T, D] from a stream, positions [b, T] and the outputs of one isolated layer, some blocks at a time."""
    blocks, size = positions.shape
    layer = isolate_layer(decoder, index)
    for some in torch.arange(blocks).split(blocks_at_once(decoder, size)):
        inputs = below.read(some.tolist())
        with precision(inputs.device, dtype):
            output = layer(inputs_embeds=inputs, position_ids=positions[some], use_cache=False)
        yield inputs, positions[some], output.last_hidden_state


def pass_original(tuned: TunedLayer, *, with_attention: bool) -> None:
    """Fill the streams with what the original layer gives on its own inputs; queries and keys if they are looked at."""
    decoder, attention = tuned.original, parts_of(tuned.original, tuned.index).attention
    filled = ("wanted", "queries", "keys") if with_attention else ("wanted",)
    for name in filled:
        tuned.streams[name].clear()
    share = carried_share(decoder.config)
    caught: list[Tensor] = []
    hook = attention.register_forward_hook(lambda module, args, output: caught.append(output[0]))

    def outputs() -> Iterator[Tensor]:
        with recorded_projections(attention) as projected:
            stream = tuned.streams["inputs"]
            for hidden, positions, output in _pass(
                decoder, tuned.index, stream, tuned.positions, tuned.dtype
            ):
                tuned.streams["wanted"].append(share * hidden + caught.pop())
                query, key, *_ = projected.pop()
                if with_attention:
                    cos, sin = rotary_of(attention, decoder, hidden, positions)
                    for name, x in (("queries", query), ("keys", key)):
                        turned = apply_rotary(x.float(), cos.float(), sin.float())
                        tuned.streams[name].append(turned.transpose(1, 2).flatten(2))
                yield output

    try:
        tuned.streams["outputs"].write(outputs())
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
