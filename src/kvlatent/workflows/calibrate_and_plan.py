"""What a text says about a checkpoint before anything is converted: statistics in a file, and a plan for a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.engines.facts import check_engine
from kvlatent.engines.kv_dtypes import KVDtype, kv_dtype_named
from kvlatent.engines.serving_figures import serving_figures
from kvlatent.jobs.atomic import prepare_file
from kvlatent.jobs.devices import choose_device, resolve_precision, working_dtype
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.model.families import head_dim_of
from kvlatent.model.widths import Width
from kvlatent.planning.candidates import candidates_for
from kvlatent.planning.figure import check_picture, draw_error_curve
from kvlatent.planning.predicted_errors import LayerErrors
from kvlatent.planning.width_plan import CurvePoint, error_curve
from kvlatent.planning.width_plan import plan as plan_widths
from kvlatent.selection.choices import Choices
from kvlatent.selection.statistics import Statistics
from kvlatent.text.documents import resolve
from kvlatent.text.parts import TextReader, check_statistics, text_to_calibrate
from kvlatent.workflows.plan_kv_bytes import Cache, check_counts, plan_kv_bytes
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
    kv_bytes: float | None = None,
    context: int | None = None,
    batch: int | None = None,
    kv_dtype: str | None = None,
    backend: str | None = None,
    figure: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The widths that a budget is best spent on, what they are worth, and the error at other budgets.

    The budget is a share of the cache, or bytes: then KV dtypes are part of the answer, and a text is not needed.

    Args:
        model: directory, hub id or GGUF file of the original.
        data: text to calibrate on; statistics: file of an earlier calibration instead.
        memory_bytes: of the device that serves, for the longest context.
        kv_bytes: of the caches of all sequences together, instead of a share.
        context: tokens of one sequence; batch: sequences at once. With a share, the ones that speed is said for.
        kv_dtype: of the cache on `engine`, see `kv_dtypes`; backend: what the engine runs on.
        figure: picture of error against budget to write (.svg, .png or .pdf); overwrite: replace it.
        progress: see `Progress`.
        options: of `RUN_OPTIONS`, `kv` (0.5 by default), `engine`, `per_layer` and `table`; and `blocks`, `seed`, `device`, `dtype`,
            `recipe` and `overrides` of the calibration.

    Returns:
        {"plan": see `WidthPlan.summary`, "serving": see `ServingFigures.summary`, "curve": budgets with their best and
        their symmetric widths, "calibration", "figure"}; with `kv_bytes` what `plan_kv_bytes` says.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    check_options(options)
    check_counts(context, batch)
    config = load_original_config(model)
    recipe, device = _recipe(options, config)
    engine, per_layer = options.get("engine"), bool(options.get("per_layer"))
    choices = choices_from_recipe(recipe.conversion, engine, per_layer=per_layer)
    cache = Cache(engine, backend, kv_dtype, choices.table, recipe.conversion.qk_norm, per_layer)
    text = _Text(model, data, statistics, recipe, device, Progress.of(progress), choices, per_layer)
    if kv_bytes is not None:
        _check_alone(kv=options.get("kv"), memory=memory_bytes, figure=figure)
        has_text = data is not None or statistics is not None
        return plan_kv_bytes(config, cache, kv_bytes, context, batch or 1, text.look if has_text else None)
    kv, stored = options.get("kv"), _stored(cache)
    kv = 0.5 if kv is None else kv
    candidates = candidates_for(
        head_dim_of(config), engine, cache.table, per_layer=per_layer, kv_dtype=stored
    )
    least, _ = candidates.splits(kv)[0]
    if engine is not None:
        check_engine(engine, least, least, cache.table, model_type=str(config.model_type))
    sizes = {"contexts": (context,)} if context else {}
    summary = partial(
        _serving, config, cache, stored, memory_bytes, sizes | ({"batches": (batch,)} if batch else {})
    )
    summary(least, least)
    if figure is not None:
        inputs = {"model": model, "data": data, "statistics": statistics, "recipe": options.get("recipe")}
        check_picture(prepare_file(figure, overwrite, inputs), overwrite=overwrite)
    seen, errors, calibration = text.look()
    widths = plan_widths(
        seen, kv, engine=engine, table=cache.table, per_layer=per_layer, kv_dtype=stored, measured=errors
    )
    curve = error_curve(seen, engine=engine, table=cache.table, kv_dtype=stored, measured=errors)
    if figure is not None:
        draw_error_curve(curve, figure, overwrite=overwrite)
    asked = {
        "head_dim": widths.head_dim,
        "engine": engine,
        "kv_dtype": None if stored is None else stored.name,
    }
    return {
        "plan": widths.summary(str(config.model_type)) | asked,
        "serving": summary(widths.d_qk, widths.d_vo),
        "curve": _rows(curve),
        "calibration": calibration,
        "figure": None if figure is None else str(figure),
    }


@dataclass(frozen=True)
class _Text:
    """A text to look at, or the statistics of one, and how."""

    model: str | Path
    data: str | Path | None
    statistics: str | Path | None
    recipe: Recipe
    device: str
    progress: Progress
    choices: Choices
    per_layer: bool

    def look(self) -> tuple[Statistics, LayerErrors, dict[str, Any]]:
        """Statistics, what narrow widths were measured to cost, and the figures of the calibration."""
        original, seen, calibration = _calibrate_or_load(
            self.model,
            self.data,
            self.statistics,
            self.recipe,
            self.device,
            self.progress,
            learns=self.choices.learns_from_text,
        )
        errors = measure_errors(
            original, seen, self.choices, self.recipe, self.progress, per_layer=self.per_layer
        )
        return seen, errors, calibration


def _check_alone(**others: Any) -> None:
    """Raise `ValueError` where a budget in bytes has a companion that it leaves no room for."""
    reasons = {
        "kv": "--kv is a budget too",
        "memory": "--memory holds the weights as well",
        "figure": "--figure draws shares of the cache",
    }
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"--kv-bytes is the budget of the cache alone, and {reasons[name]}: got both; give one of them"
            )


def _stored(cache: Cache) -> KVDtype | None:
    """The KV dtype that was asked for; None for that of the model."""
    if cache.kv_dtype is not None:
        return kv_dtype_named(cache.kv_dtype, cache.engine, cache.backend)
    if cache.backend is not None:
        raise ValueError(
            f"--backend says which KV dtypes there are, so it goes with --kv-dtype or --kv-bytes: got --backend {cache.backend} "
            "alone; give one of them, or leave it out"
        )
    return None


def _serving(
    config: Any,
    cache: Cache,
    stored: KVDtype | None,
    memory_bytes: float | None,
    sizes: Mapping[str, Any],
    d_qk: Width,
    d_vo: Width,
) -> dict[str, Any]:
    """What widths are worth in the KV dtype that was asked for."""
    figures = serving_figures(config, d_qk, d_vo, kv_dtype=stored, qk_norm=cache.qk_norm)
    return figures.summary(memory_bytes, **sizes)


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
    with scratch_folder() as cache:
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
