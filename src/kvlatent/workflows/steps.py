"""The steps that `compress` and `convert` share: calibrate, settle the widths, convert and report on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.layer_report import layer_report
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.assembly import assemble
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of
from kvlatent.planning.width_plan import plan as plan_widths
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.pairs import scope_errors
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import calibration_blocks
from kvlatent.workflows.run_plan import Plan

__all__ = ["Progress", "gathered", "made", "restored", "reused", "settled", "write_attention"]

Progress = Callable[[str, int, int, str], None]
"""Called with a step's name, how much of it is done, of how much (0: unknown), and a note."""


def gathered(
    model: PreTrainedModel, text: Dataset, recipe: Recipe, progress: Progress
) -> tuple[Statistics, dict[str, Any]]:
    """Statistics of the model over blocks drawn from those of a text, and the figures of the calibration (JSON-able).

    Raises:
        ValueError: too little text, or activations that are not finite.
    """
    blocks, start = calibration_blocks(text, recipe), time.monotonic()
    tokens = len(blocks[0]["input_ids"])

    def report(done: int, total: int) -> None:
        speed = done * tokens / max(time.monotonic() - start, 1e-9)
        progress("calibrate", done, total, f"{speed:,.0f} tokens/s")

    statistics = calibrate(model, blocks, rows=recipe.calibration.rows, seed=recipe.seed, progress=report)
    return statistics, _figures(statistics, time.monotonic() - start)


def reused(path: str | Path, model: PreTrainedModel) -> tuple[Statistics, dict[str, Any]]:
    """Statistics that an earlier calibration of this model saved, and their figures.

    Raises:
        FileNotFoundError, ValueError: no such file, a damaged one, or one of another model.
    """
    statistics = Statistics.load(path)
    statistics.check(model)
    return statistics, _figures(statistics, 0.0)


def _figures(statistics: Statistics, seconds: float) -> dict[str, Any]:
    return {
        "blocks": len(statistics.input_ids),
        "tokens": statistics.tokens,
        "seconds": round(seconds, 2),
        "fingerprint": statistics.fingerprint,
    }


def settled(plan: Plan, statistics: Statistics | None) -> tuple[Plan, dict[str, Any] | None]:
    """The plan with its widths, and what the statistics predict of them where they chose the split.

    Raises:
        ValueError: no widths keep so little of the cache.
    """
    if plan.widths is not None or statistics is None:
        return plan, None
    found = plan_widths(
        statistics,
        plan.kv,
        engine=plan.engine,
        table=plan.choices.table,
        per_layer=plan.per_layer,
        aligned=plan.choices.align > 0,
    )
    return replace(plan, widths=(found.d_qk, found.d_vo)), found.summary()


def made(
    model: PreTrainedModel, plan: Plan, statistics: Statistics | None, progress: Progress
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The converted model, and the figures of the conversion: seconds, and what the statistics say of the choices.

    Args:
        model: the original.
        plan: with its widths.
        statistics: None where the choices look at none.

    Returns:
        The latent model, and {"seconds", "layers", "scope_errors"}: for each layer the widths and the relative squared
        error of the attention output under every strategy, before anything is tuned (a tuned layer makes up for what
        those below it left, and so is no longer close to the original on the original's own inputs); and what each
        scope of the rotary table costs.
    """
    assert plan.widths is not None
    d_qk, d_vo = plan.widths
    start = time.monotonic()
    progress("convert", 0, 0, "")
    latent = convert(
        model,
        d_qk=d_qk,
        d_vo=d_vo,
        choices=plan.choices,
        qk_norm=plan.recipe.conversion.qk_norm,
        statistics=statistics,
        seed=plan.recipe.seed,
        progress=lambda step, done, total: progress(step, done, total, ""),
    )
    figures: dict[str, Any] = {"seconds": round(time.monotonic() - start, 2)}
    if statistics is not None:
        config = latent_config_of(latent.config)
        progress("report", 0, 0, "")
        figures |= {
            "layers": layer_report(model, statistics, config),
            "scope_errors": scope_errors(statistics, config.d_qk),
        }
    return latent, figures


def write_attention(latent: PreTrainedModel, path: Path) -> None:
    """Save what a conversion made, the attention tensors and the latent config, whole or not at all."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in latent.state_dict().items()
        if f".{family_of(latent.config).attention}." in name
    }
    about = {"kv_latent": json.dumps(latent_config_of(latent.config).to_dict())}
    write_atomically(path, lambda file: save_file(tensors, file, metadata=about))


def restored(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The latent model that `write_attention` saved, put together again from the original, bit for bit."""
    with safe_open(path, framework="pt", device=str(model.device)) as file:
        config = LatentConfig.from_dict(json.loads(file.metadata()["kv_latent"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def of_layer(index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}.{family_of(model.config).attention}."
        return {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }

    return assemble(model, config, of_layer)
