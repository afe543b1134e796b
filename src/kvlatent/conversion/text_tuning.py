"""What a conversion learns from its text, from the closed form on: layer by layer, then all layers at once.

A step alone is a call with the choices of the others turned off, so that who has a clock can stop between them; the
weights are the same, to the bit, as those of one call.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from kvlatent.conversion.global_pass import tune_all_layers
from kvlatent.conversion.refinement import refine
from kvlatent.jobs.progress import Progress
from kvlatent.model.assembly import full_width
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics

__all__ = ["frozen_pair", "tune_on_text"]


def tune_on_text(
    model: Any,
    latent: Any,
    statistics: Statistics,
    choices: Choices,
    *,
    seed: int,
    dtype: str,
    progress: Progress,
) -> dict[str, Any]:
    """Align, refit and tune `latent` in place, as `choices` say; nothing where both sides keep their full width.

    Args:
        model: the original; it is left as it was.
        latent: converted from it in closed form, or by earlier steps.
        statistics: of `model`, with the text.
        seed: of the sampling; dtype: of the products, "float32" or "bfloat16".
        progress: told after every step.

    Returns:
        Of the steps that were taken, "layers" (see `refine`) and "global_pass" (see `tune_all_layers`).
    """
    config = latent_config_of(latent.config)
    measured: dict[str, Any] = {}
    if not choices.tunes or config.keys == config.values == "full":
        return measured
    given: dict[str, Any] = {"seed": seed, "dtype": dtype, "progress": progress}
    with frozen_pair(model, latent) as twin:
        if choices.refit or choices.align:
            measured["layers"] = refine(twin, latent, config, statistics, choices, **given)
        if choices.global_steps:
            steps = choices.global_steps
            measured["global_pass"] = tune_all_layers(twin, latent, config, statistics, steps=steps, **given)
    return measured


@contextmanager
def frozen_pair(model: Any, latent: Any) -> Generator[Any]:
    """The original as its full-width twin; it and `latent` collect no gradients within, but for what is tuned there."""
    with torch.inference_mode(False):  # which also turns gradients on where the caller turned them off
        training, twin = latent.training, full_width(model).eval()
        for each in (twin, latent.eval()):
            each.requires_grad_(False)
        yield twin
        latent.train(training).requires_grad_(True)
