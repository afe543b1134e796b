"""Why this conversion and not another: what every strategy does to the attention output of every layer, measured.

Each strategy is built at the same widths and fed the original's own inputs, so that layers are judged one by one; what
errors do to the layers above is the business of perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.conversion.convert_model import convert
from kvlatent.model.assembly import full_width
from kvlatent.model.config import LatentConfig, table_scope
from kvlatent.model.families import attention_layers_of
from kvlatent.model.layer_parts import parts_of, rotary_of_decoder
from kvlatent.selection.choices import BY_PAIRS, PAPER, Choices, resolve_choices
from kvlatent.selection.statistics import Statistics

__all__ = ["STRATEGIES", "layer_report"]

STRATEGIES: dict[str, Choices] = {
    "paper": PAPER,
    "matched": Choices(keys="matched"),
    "stride": Choices(),
    "energy": Choices(keys="energy", values="whitened", table="head"),
    "calibrated": resolve_choices("calibrated", align=0, refit=False),
}
"""Closed forms, nothing tuned; pairs keep their own frequencies and the softmax its scale, but for the paper's."""

_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def layer_report(
    model: Any,
    statistics: Statistics,
    config: LatentConfig,
    *,
    blocks: int = 4,
) -> list[dict[str, Any]]:
    """Relative squared error ||o' - o||^2 / ||o||^2 of the attention output of every layer under every strategy.

    All positions of the first calibration blocks count, on the original's inputs. One strategy is in memory at a time.

    Args:
        model: the original; it is left as it was.
        statistics: of `model`; their text is looked at again.
        config: whose widths, scope of the tables and treatment of a QK-norm all strategies get.
        blocks: how many calibration blocks to look at; 0 < blocks.

    Returns:
        One dict a layer: `layer`, `d_qk`, `d_vo`, `errors` (by strategy; None where it is impossible at these widths)
        and `reasons` (by impossible strategy).

    Raises:
        ValueError: statistics of another model, or no blocks.
    """
    if blocks < 1:
        raise ValueError(f"the layer report looks at 1 calibration block or more: got blocks={blocks}; try 4")
    statistics.check(model)
    twin = full_width(model).eval()
    text = [t[:blocks].long().to(model.device) for t in (statistics.input_ids, statistics.position_ids)]
    numbers = attention_layers_of(model.config)
    widths = config.widths.per_layer(len(numbers))
    rows: dict[int, dict[str, Any]] = {
        index: {"layer": index, "d_qk": d_qk, "d_vo": d_vo, "errors": {}, "reasons": {}}
        for index, (d_qk, d_vo) in zip(numbers, widths, strict=True)
    }
    for name, choices in STRATEGIES.items():
        for places, converted in _build(model, statistics, config, choices, widths):
            layers = [numbers[place] for place in places]
            if isinstance(converted, str):
                for index in layers:
                    rows[index]["errors"][name], rows[index]["reasons"][name] = None, converted
                continue
            errors = _measure_errors(twin, converted, layers, *text)
            for index in layers:
                rows[index]["errors"][name] = errors[index]
    return list(rows.values())


def _build(
    model: Any, statistics: Statistics, config: LatentConfig, choices: Choices, widths: list[tuple[int, int]]
) -> Iterator[tuple[list[int], Any]]:
    """Places of layers in lists by layer and the model in which they follow `choices`, or the sentence that says why they cannot.

    Where not all layers can, each set of layers of equal widths is tried alone, the others kept whole.
    """
    everything = list(range(len(widths)))
    converted = _convert(model, statistics, config, choices, widths)
    if not isinstance(converted, str) or len(set(widths)) == 1:
        yield everything, converted
        return
    full = (config.original_head_dim, config.original_head_dim)
    for one in sorted(set(widths)):
        alone = [width if width == one else full for width in widths]
        layers = [index for index in everything if widths[index] == one]
        yield layers, _convert(model, statistics, config, choices, alone)


def _convert(
    model: Any, statistics: Statistics, config: LatentConfig, choices: Choices, widths: list[tuple[int, int]]
) -> Any:
    """The closed form of a strategy, its chosen pairs shared as in `config`; or why it is impossible."""
    if choices.keys in BY_PAIRS:
        choices = replace(choices, table=table_scope(config))
    try:
        return convert(
            model,
            d_qk=[d_qk for d_qk, _ in widths],
            d_vo=[d_vo for _, d_vo in widths],
            choices=choices,
            qk_norm="full" if config.qk_norm == "none" else config.qk_norm,
            statistics=statistics,
        )
    except ValueError as error:
        return str(error)


def _measure_errors(
    twin: Any, latent: Any, layers: list[int], ids: Tensor, positions: Tensor
) -> dict[int, float]:
    """Relative squared error of the attention output of `layers` of `latent`, on what the twin's layers see."""
    error, energy = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    now = [positions]  # of the block that is read

    def compare(index: int, other: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            turned = rotary_of_decoder(latent.get_decoder())(hidden, now[0])
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            given, _ = other(hidden, **{**rest, "position_embeddings": turned})
            error[index] += float((given.float() - output[0].float()).square().sum(dtype=torch.float64))
            energy[index] += float(output[0].float().square().sum(dtype=torch.float64))

        return hook

    latent.eval()
    with ExitStack() as hooks:
        for index in layers:
            attention, other = (parts_of(m.get_decoder(), index).attention for m in (twin, latent))
            hook = attention.register_forward_hook(compare(index, other), with_kwargs=True)
            hooks.callback(hook.remove)
        for block in range(len(ids)):
            now[0] = positions[block, None]
            twin.get_decoder()(input_ids=ids[block, None], position_ids=now[0], use_cache=False)
    return {index: error[index] / max(energy[index], _TINY) for index in layers}
