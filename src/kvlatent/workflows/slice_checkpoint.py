"""A narrower latent checkpoint cut out of a wider one: what `kvlatent slice` does. Nothing is trained, no text is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.devices import resolve_precision
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.channel_slices import check_sliceable, slice_model, widths_at_share, widths_within
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of
from kvlatent.model.widths import Width, Widths
from kvlatent.workflows.continued_record import describe_as_before, load_latent_config, plan_of_latent
from kvlatent.workflows.run_record import read_record
from kvlatent.workflows.steps import describe_run, hash_sources, options_as_typed, save_run

__all__ = ["slice_checkpoint"]

_NEVER_TRAINED = (
    "its channels were never trained to be cut, so the first of them are no better than any; train it with --set "
    "stage2.nested_kv=[...] first, or measure the slice with kvlatent eval"
)
_NOT_THIS_WIDTH = (
    "it was trained at other widths ({trained}), between or below which nothing was measured; kvlatent eval says what "
    "this one costs"
)


def slice_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    kv: float | None = None,
    d_qk: Width | None = None,
    d_vo: Width | None = None,
    overwrite: bool = False,
    progress: Progress | Report | None = None,
) -> dict[str, Any]:
    """Cut the first channels of a latent checkpoint into one of its own, loaded, trained and exported like any other.

    A slice at the checkpoint's own widths has its tensors, bit for bit. One of a checkpoint that was not trained for
    it is written as well, with a warning.

    Args:
        model: directory or hub id of a latent checkpoint.
        out: directory to write: whole, or not at all.
        kv: share of the original's cache that the slice keeps at most; every layer keeps the same part of its own.
        d_qk, d_vo: widths instead of a share, one number or one per layer; the side left out stays as it is.
        overwrite: replace what `out` holds.
        progress: told of each step.

    Returns:
        The JSON-able record that is written as `out/run.json`, with what to know of the slice in its "warnings".

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    config, report = load_latent_config(model), Progress.of(progress)
    widths = _resolve(config, kv, d_qk, d_vo)
    place = prepare_output(out, overwrite, {"model": model})
    previous = read_record(Path(model) / "run.json") or {}
    typed = options_as_typed({"out": place}, {"kv": kv, "d_qk": d_qk, "d_vo": d_vo})
    record = describe_run("slice", model, typed, hash_sources({"model": model, "data": None}, "text"), "cpu")
    report.report("load")
    whole = load_model(model)
    tokenizer = load_tokenizer(model, config)
    report.report("cut")
    saved = Path(model) / "recipe.yaml"
    recipe = Recipe.load(saved if saved.is_file() else None)
    plan = plan_of_latent(config, resolve_precision(recipe, config, "cpu"), widths)
    record |= describe_as_before(previous, plan, dict(previous.get("training", {})))
    record["warnings"] = _judge(previous, config, widths)
    save_run(slice_model(whole, widths), place, record, recipe, tokenizer, source=model, overwrite=overwrite)
    for warning in record["warnings"]:
        warnings.warn(warning, stacklevel=2)
    return record


def _resolve(config: Any, kv: float | None, d_qk: Width | None, d_vo: Width | None) -> Widths:
    """The widths of the slice.

    Raises:
        ValueError: none are given, or both a share and widths, or some that the checkpoint has not.
    """
    latent, layers = latent_config_of(config), len(attention_layers_of(config))
    check_sliceable(latent)
    if kv is None and d_qk is None and d_vo is None:
        raise ValueError("a slice needs a width: got none; pass --kv 0.28, or --d-qk and --d-vo")
    if kv is not None and not (d_qk is None and d_vo is None):
        raise ValueError(
            f"--kv {kv:g} and widths say the same thing: got both; give --kv, or --d-qk and --d-vo"
        )
    return widths_within(latent, layers, d_qk, d_vo) if kv is None else widths_at_share(latent, layers, kv)


def _judge(previous: dict[str, Any], config: Any, widths: Widths) -> list[str]:
    """What a user should know before trusting the slice, from the record of its checkpoint."""
    latent, layers = latent_config_of(config), len(attention_layers_of(config))
    stage = previous.get("training", {}).get("stage2", {})
    trained = [
        Widths(*(_numbers(each[side]) for side in ("d_qk", "d_vo")))
        for each in stage.get("nested_widths", ())
    ]
    wanted = widths.per_layer(layers)
    if wanted == latent.widths.per_layer(layers) or any(each.per_layer(layers) == wanted for each in trained):
        return []
    if not trained:
        return [_NEVER_TRAINED]
    named = " and ".join(f"{each.d_qk}/{each.d_vo}" for each in trained)
    return [_NOT_THIS_WIDTH.format(trained=named)]


def _numbers(width: int | list[int]) -> int | tuple[int, ...]:
    return width if isinstance(width, int) else tuple(width)
