"""What a text says about a checkpoint before anything is converted: statistics in a file, and a plan for a budget."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.engines.facts import check_engine
from kvlatent.engines.serving_figures import serving_figures
from kvlatent.jobs.atomic import prepare_file
from kvlatent.jobs.devices import choose_device, resolve_precision, working_dtype
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.families import head_dim_of
from kvlatent.planning.candidates import candidates_for
from kvlatent.planning.figure import check_picture, draw_error_curve
from kvlatent.planning.width_plan import CurvePoint, error_curve
from kvlatent.planning.width_plan import plan as plan_widths
from kvlatent.selection.statistics import Statistics
from kvlatent.text.documents import resolve
from kvlatent.text.parts import TextReader, check_statistics, text_to_calibrate
from kvlatent.workflows.run_plan import choices_from_recipe, load_original_config
from kvlatent.workflows.settings import check_options, recipe_overrides
from kvlatent.workflows.steps import (
    collect_statistics,
    load_original,
    load_statistics,
)
from kvlatent.workflows.width_choice import measure_errors

__all__ = ["calibrate_checkpoint", "plan_checkpoint"]


def calibrate_checkpoint(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Collect the statistics of `model` over a sample of `data` and save them in one file, for any conversion.

    As most conversions align, some blocks of the text are made to ask for recall (`calibration.recall` of the recipe; 0
    for none).

    Args:
        model: directory, hub id or GGUF file of the original.
        data: text; nothing of it is held out, so measure on another one.
        out: file to write, safetensors.
        overwrite: replace it.
        progress: see `Progress`.
        options: of `RUN_OPTIONS`, `blocks`, `seed`, `device`, `dtype`, `recipe` and `overrides` are read.

    Returns:
        {"out", "blocks", "recall_blocks" (of these), "tokens", "seconds", "fingerprint" (of the model), "bytes" (of the
        file)}, and "no_recall", the reason, where the blocks are too short or too few for the recipe's default.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    check_options(options)
    recipe, device = _recipe(options, load_original_config(model))
    target = prepare_file(out, overwrite, {"model": model, "data": data, "recipe": options.get("recipe")})
    resolve(data)
    _, statistics, figures = _calibrate(model, data, recipe, device, Progress.of(progress), learns=True)
    statistics.save(target, overwrite=overwrite)
    return {"out": str(out), **figures, "bytes": target.stat().st_size}


def plan_checkpoint(
    model: str | Path,
    *,
    data: str | Path | None = None,
    statistics: str | Path | None = None,
    memory_bytes: float | None = None,
    figure: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The widths that a budget is best spent on, what they are worth, and the error at other budgets.

    Args:
        model: directory, hub id or GGUF file of the original.
        data: text to calibrate on; statistics: file of an earlier calibration instead.
        memory_bytes: of the device that serves, for the longest context.
        figure: picture of error against budget to write (.svg, .png or .pdf); overwrite: replace it.
        progress: see `Progress`.
        options: of `RUN_OPTIONS`, `kv` (0.5 by default), `engine`, `per_layer` and `table`; and `blocks`, `seed`, `device`, `dtype`,
            `recipe` and `overrides` of the calibration.

    Returns:
        {"plan": see `WidthPlan.summary`, "serving": see `ServingFigures.summary`, "curve": budgets with their best and
        their symmetric widths, "calibration", "figure"}.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    check_options(options)
    config = load_original_config(model)
    recipe, device = _recipe(options, config)
    kv, engine = options.get("kv"), options.get("engine")
    kv, per_layer = 0.5 if kv is None else kv, bool(options.get("per_layer"))
    choices, qk_norm = choices_from_recipe(recipe.conversion, engine), recipe.conversion.qk_norm
    table, told = choices.table, Progress.of(progress)
    (least, *_), *_ = candidates_for(head_dim_of(config), engine, table, per_layer=per_layer).splits(kv)
    if engine is not None:
        check_engine(engine, least, least, table, model_type=str(config.model_type))
    serving_figures(config, least, least, qk_norm=qk_norm).summary(memory_bytes)
    if figure is not None:
        inputs = {"model": model, "data": data, "statistics": statistics, "recipe": options.get("recipe")}
        check_picture(prepare_file(figure, overwrite, inputs), overwrite=overwrite)
    original, seen, calibration = _calibrate_or_load(
        model, data, statistics, recipe, device, told, learns=choices.learns_from_text
    )
    errors = measure_errors(original, seen, choices, recipe, told, per_layer=per_layer)
    widths = plan_widths(seen, kv, engine=engine, table=table, per_layer=per_layer, measured=errors)
    curve = error_curve(seen, engine=engine, table=table, measured=errors)
    if figure is not None:
        draw_error_curve(curve, figure, overwrite=overwrite)
    worth = serving_figures(config, widths.d_qk, widths.d_vo, qk_norm=qk_norm)
    return {
        "plan": widths.summary(str(config.model_type)) | {"head_dim": widths.head_dim, "engine": engine},
        "serving": worth.summary(memory_bytes),
        "curve": _rows(curve),
        "calibration": calibration,
        "figure": None if figure is None else str(figure),
    }


def _recipe(options: Mapping[str, Any], config: Any) -> tuple[Recipe, str]:
    """The recipe, its dtype resolved, and the device."""
    device = choose_device(options.get("device") or "auto")
    return resolve_precision(
        Recipe.load(options.get("recipe"), recipe_overrides(options)), config, device
    ), device


def _calibrate_or_load(
    model: str | Path,
    data: str | Path | None,
    statistics: str | Path | None,
    recipe: Recipe,
    device: str,
    progress: Progress,
    *,
    learns: bool,
) -> tuple[PreTrainedModel, Statistics, dict[str, Any]]:
    """The original, its statistics from a file, or collected from a text, and the figures of the calibration."""
    if (data is None) == (statistics is None):
        raise ValueError(
            f"a plan looks at one text, or at the statistics of one: got {'both' if data else 'neither'}; give --data "
            "FILE or --statistics FILE"
        )
    if statistics is None:
        assert data is not None
        resolve(data)
        return _calibrate(model, data, recipe, device, progress, learns=learns)
    check_statistics(statistics)
    original = load_model(model, dtype=_working_dtype(model, recipe, device), device=device)
    return original, *load_statistics(statistics, original)


def _working_dtype(model: str | Path, recipe: Recipe, device: str) -> str:
    return working_dtype(recipe.dtype, device, load_config(str(model)).dtype)


def _calibrate(
    model: str | Path, data: str | Path, recipe: Recipe, device: str, progress: Progress, *, learns: bool
) -> tuple[PreTrainedModel, Statistics, dict[str, Any]]:
    original, tokenizer = load_original(model, _working_dtype(model, recipe, device), device, progress)
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as cache:
        blocks = text_to_calibrate(TextReader(recipe, tokenizer, original.config, cache), data)
        return original, *collect_statistics(original, tokenizer, blocks, recipe, progress, learns=learns)


def _rows(curve: Sequence[CurvePoint]) -> list[dict[str, Any]]:
    """A curve as JSON-able rows."""
    return [
        {
            "kv": point.kv,
            "d_qk": point.best.d_qk,
            "d_vo": point.best.d_vo,
            "error": point.best.error,
            "symmetric_width": point.symmetric.d_qk,
            "symmetric_error": point.symmetric.error,
        }
        for point in curve
    ]
