"""What the steps of a conversion cost on the machine at hand, in seconds, by taking a few of each.

Nothing of it stays in the model. The figures err on the side of more: a few steps measure more often than many do. What
is foreseen before anything is known of a text errs on the side of less, so that no budget that is enough is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlatent.conversion.global_pass import blocks_of_a_step, tune_all_layers
from kvlatent.conversion.refinement import refine
from kvlatent.conversion.text_tuning import frozen_pair
from kvlatent.jobs.devices import precision
from kvlatent.jobs.progress import Progress
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics
from kvlatent.text.recall_blocks import held_out_blocks

__all__ = ["StepCosts", "foresee_step_costs", "forward_seconds", "measure_step_costs"]

_ALIGNED, _GLOBAL = 12, 3  # steps to take; of alignment, in one layer

_MEASURED = 10  # times that the global pass looks at its held-out blocks

_PASSES, _OF_A_STEP = (
    2,
    3,
)  # forwards of the text through both models, and of its blocks in a step on all layers


@dataclass(frozen=True)
class StepCosts:
    """Seconds that parts of a conversion take.

    Args:
        refine_s: to bring the text through all layers and refit them, whatever is aligned.
        align_s: one step of attention alignment and one of output alignment, in every layer.
        global_start_s: what the global pass takes beside its steps; global_s: one step of it.
        forward_s: a token through the original.
    """

    refine_s: float
    align_s: float
    global_start_s: float
    global_s: float
    forward_s: float


def measure_step_costs(
    model: Any,
    latent: Any,
    statistics: Statistics,
    choices: Choices,
    *,
    seed: int,
    dtype: str,
    clock: Callable[[], float],
) -> StepCosts:
    """Take a few steps of each kind by the clock, and put everything back as it was.

    Args:
        model, latent, seed, dtype: as for `tune_on_text`; at least one side is narrow.
        statistics: the text to take the steps on.
        choices: of the conversion; whether it refits is read.
        clock: seconds since whenever.
    """

    now, given = _synchronised(clock, latent.device), dict[str, Any](seed=seed, dtype=dtype)
    with frozen_pair(model, latent) as twin, _put_back(latent):
        config = latent_config_of(latent.config)
        forward_s = forward_seconds(model, statistics, dtype, clock)
        alone, aligned = _layer_seconds(twin, latent, statistics, choices, now, **given)
        marks: list[float] = []
        few = _first_blocks(statistics, blocks_of_a_step(statistics.input_ids.shape[1]) + 1)
        told = Progress(lambda **report: marks.append(now()))
        tune_all_layers(twin, latent, config, few, steps=_GLOBAL, progress=told, **given)
    layers = len(statistics.layers)
    first, last = marks[1], marks[-2]  # it is told before the first step, and once more at the end
    measured = len(held_out_blocks(len(statistics.input_ids))) * statistics.input_ids.shape[1]
    return StepCosts(
        refine_s=layers * alone,
        align_s=layers * max(0.0, aligned - alone) / _ALIGNED,
        global_start_s=forward_s * (statistics.tokens + _MEASURED * measured),
        global_s=(last - first) / (len(marks) - 3),
        forward_s=forward_s,
    )


def foresee_step_costs(
    model: Any,
    latent: Any,
    few: Statistics,
    choices: Choices,
    *,
    blocks: int,
    seed: int,
    dtype: str,
    clock: Callable[[], float],
) -> StepCosts:
    """What `measure_step_costs` will find at least, from a few seconds of work.

    Args:
        latent: of the widths that are likely, whatever its weights.
        few: some blocks of the text; nothing else of it is read.
        blocks: of the whole text.
        model, choices, seed, dtype, clock: as for `measure_step_costs`.
    """
    now, size = _synchronised(clock, latent.device), few.input_ids.shape[1]
    with frozen_pair(model, latent) as twin, _put_back(latent):
        forward_s = forward_seconds(model, few, dtype, clock)
        alone, aligned = _layer_seconds(twin, latent, few, choices, now, seed=seed, dtype=dtype)
    measured = _MEASURED * len(held_out_blocks(blocks))
    return StepCosts(
        refine_s=_PASSES * forward_s * blocks * size,
        align_s=len(attention_layers_of(latent.config)) * max(0.0, aligned - alone) / _ALIGNED,
        global_start_s=forward_s * size * (blocks + measured),
        global_s=_OF_A_STEP * forward_s * size * blocks_of_a_step(size),
        forward_s=forward_s,
    )


def _synchronised(clock: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """The clock, behind what a GPU still has to do."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    return now


def _layer_seconds(
    twin: Any, latent: Any, text: Statistics, choices: Choices, now: Callable[[], float], **given: Any
) -> tuple[float, float]:
    """The lowest layer refined without steps, and with a few."""
    marks = [now()]
    for align in (0, _ALIGNED):
        few_steps, config = replace(choices, align=align), latent_config_of(latent.config)
        refine(twin, latent, config, text, few_steps, layers=1, progress=Progress(), **given)
        marks.append(now())
    return marks[1] - marks[0], marks[2] - marks[1]


@torch.no_grad()
def forward_seconds(model: Any, statistics: Statistics, dtype: str, clock: Callable[[], float]) -> float:
    """Of a token of the text, logits included; the first block warms up."""
    now = _synchronised(clock, model.device)
    ids, positions = (t.long().to(model.device) for t in (statistics.input_ids, statistics.position_ids))
    seconds = 0.0
    for block in (0, len(ids) - 1):
        start = now()
        with precision(model.device, dtype):
            model(input_ids=ids[block, None], position_ids=positions[block, None], use_cache=False)
        seconds = now() - start
    return seconds / ids.shape[1]


def _first_blocks(statistics: Statistics, count: int) -> Statistics:
    ids, positions = (t[:count] for t in (statistics.input_ids, statistics.position_ids))
    return replace(statistics, input_ids=ids, position_ids=positions)


@contextmanager
def _put_back(model: Any) -> Generator[None]:
    """Whatever takes the place of a parameter or of its data within, the old ones are there again behind it."""
    held = [
        (module, name, parameter, parameter.data)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, parameter, data in held:
            parameter.data = data
            setattr(module, name, parameter)
