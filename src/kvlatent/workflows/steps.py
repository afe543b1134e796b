"""The steps that the workflows share: hash what is read, load, calibrate, resolve widths, convert, note, save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.card import model_card
from kvlatent.checkpoints.gguf_files import describe_weights
from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.layer_report import layer_report
from kvlatent.evaluation.recall import measure_recall
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import command_line, environment, name_for_record
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import Choices
from kvlatent.selection.pairs import scope_errors
from kvlatent.selection.statistics import Statistics
from kvlatent.text.documents import resolve
from kvlatent.text.parts import Texts, calibration_blocks, seen_share
from kvlatent.text.recall_blocks import RECALL_SHARE, why_no_recall
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.run_record import RunRecord

__all__ = [
    "EVALUATION_TOKENS",
    "Announce",
    "calibrate_or_load",
    "check_texts",
    "collect_statistics",
    "conversion_figures",
    "convert_and_report",
    "convert_as_planned",
    "describe_run",
    "explain_layers",
    "files_of_run",
    "hash_sources",
    "load_original",
    "load_statistics",
    "measure_copying",
    "options_as_typed",
    "save_run",
]

EVALUATION_TOKENS = 65_536

Announce = Callable[[dict[str, Any]], None]
"""Called with the plan once every argument, the model and the text have passed their checks, before the work."""


def check_texts(*texts: str | Path | None) -> None:
    """Raise `FileNotFoundError` where there is no such text, `ValueError` where it cannot be read."""
    for text in texts:
        if text is not None:
            resolve(text)


def hash_sources(files: Mapping[str, str | Path | None], use: str) -> dict[str, str | None]:
    """What identifies the sources of a run, by their names: "data", "eval_data", "model" and others.

    Args:
        use: what "data" is, in words.

    Raises:
        ValueError: the figures would be of the text that is fitted to.
    """
    hashes = {name: None if file is None else identity(file) for name, file in files.items()}
    if hashes["data"] is not None and hashes["data"] == hashes.get("eval_data"):
        raise ValueError(
            f"--eval-data is the {use}; leave it out to measure on a held-out part, or give another file"
        )
    return hashes


def describe_run(
    command: str, model: str | Path, typed: dict[str, Any], sha256: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """What a record starts with: the command that repeats the run, its sources, versions and the machine. JSON-able."""
    return {
        "command": command_line(command, model, typed),
        "source": lineage(model),
        "weights": describe_weights(model),
        "sha256": dict(sha256),
        **environment(device),
    }


def options_as_typed(files: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as the command line spells them; files by their last name, but for those of the hub."""
    named = {
        name: Path(file).name if name == "out" else name_for_record(file)
        for name, file in files.items()
        if file
    }
    spelled = {("set" if name == "overrides" else name): value for name, value in options.items()}
    recipe = spelled.pop("recipe", None)
    if isinstance(recipe, (str, Path)):
        named["recipe"] = Path(recipe).name
    return named | spelled


def load_original(
    model: str | Path, dtype: str | None, device: str, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The original, frozen, in that dtype (None: its own), and its tokenizer."""
    progress.report("load")
    original = load_model(model, dtype=dtype, device=device).requires_grad_(False).eval()
    return original, load_tokenizer(model, original.config)


def calibrate_or_load(
    plan: Plan,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    file: str | Path | None,
    progress: Progress,
) -> tuple[Statistics | None, dict[str, Any] | None]:
    """What the conversion looks at, of the text or from a file, and figures of it; None where it looks at nothing."""
    if not plan.calibrates:
        return None, None
    if file is None:
        assert texts.train is not None
        learns = plan.choices.learns_from_text
        return collect_statistics(original, tokenizer, texts.train, plan.recipe, progress, learns=learns)
    statistics, figures = load_statistics(file, original)
    if texts.held_out is not None:
        figures["seen_share"] = seen_share(texts.held_out, statistics.input_ids)
    return statistics, figures


def collect_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Dataset,
    recipe: Recipe,
    progress: Progress,
    *,
    learns: bool,
) -> tuple[Statistics, dict[str, Any]]:
    """Statistics of the model over blocks drawn from those of a text, and the figures of the calibration (JSON-able).

    Args:
        learns: a conversion will take steps on the blocks, some of which then ask for recall (`calibration_blocks`).

    Raises:
        ValueError: too little text, or activations that are not finite.
    """
    start = time.monotonic()
    blocks = calibration_blocks(text, recipe, tokenizer, learns=learns)
    step = progress.step("calibrate", len(blocks), tokens=len(blocks[0]["input_ids"]))
    statistics = calibrate(
        model,
        blocks,
        rows=recipe.calibration.rows,
        seed=recipe.seed,
        progress=step.to,
    )
    figures = _figures(statistics, time.monotonic() - start)
    if learns and recipe.calibration.recall is None:
        reason = why_no_recall(*statistics.input_ids.shape, RECALL_SHARE)
        figures |= {} if reason is None else {"no_recall": reason}
    return statistics, figures


def load_statistics(path: str | Path, model: PreTrainedModel) -> tuple[Statistics, dict[str, Any]]:
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
        "recall_blocks": statistics.recall_blocks,
        "tokens": statistics.tokens,
        "seconds": round(seconds, 2),
        "fingerprint": statistics.fingerprint,
    }


def convert_and_report(
    model: PreTrainedModel, plan: Plan, statistics: Statistics | None, progress: Progress
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The converted model, and the figures of the conversion.

    Args:
        model: the original.
        plan: with its widths.
        statistics: None where the choices look at none.

    Returns:
        The latent model, and {"seconds"}; with statistics "scope_errors", what each scope of the rotary table costs;
        and "layers" where the plan explains (see `explain_layers`).
    """
    start = time.monotonic()
    progress.report("convert")
    latent = convert_as_planned(model, plan, statistics, plan.choices, progress)
    return latent, conversion_figures(model, latent, plan, statistics, time.monotonic() - start, progress)


def convert_as_planned(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics | None,
    choices: Choices,
    progress: Progress,
) -> PreTrainedModel:
    """The original, converted with the plan's widths and seed."""
    assert plan.widths is not None
    return convert(
        model,
        d_qk=plan.widths.d_qk,
        d_vo=plan.widths.d_vo,
        choices=choices,
        qk_norm=plan.recipe.conversion.qk_norm,
        statistics=statistics,
        seed=plan.recipe.seed,
        progress=progress,
    )


def conversion_figures(
    model: PreTrainedModel,
    latent: PreTrainedModel,
    plan: Plan,
    statistics: Statistics | None,
    seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    """What `convert_and_report` says of a conversion that took so many seconds."""
    figures: dict[str, Any] = {"seconds": round(seconds, 2)}
    if statistics is not None:
        figures["scope_errors"] = scope_errors(statistics, latent_config_of(latent.config).d_qk)
        if plan.explain:
            figures |= explain_layers(model, latent, statistics, progress)
    return figures


def explain_layers(
    model: PreTrainedModel, latent: PreTrainedModel, statistics: Statistics, progress: Progress
) -> dict[str, Any]:
    """{"layers"}: widths, and the relative squared error of the attention output under every strategy, a row a layer.

    Before anything is tuned: a tuned layer makes up for what those below it left, and so is no longer close to the
    original on the original's own inputs. It converts the model once for every strategy.
    """
    progress.report("explain")
    return {"layers": layer_report(model, statistics, latent_config_of(latent.config))}


def measure_copying(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blocks: Dataset, progress: Progress
) -> dict[str, Any]:
    """{"recall"} of one model on held-out blocks; {} where context or text is too short for it."""
    recall = measure_recall(model, tokenizer, blocks, progress=progress.step(f"recall of {name}").to)
    return {} if recall is None else {"recall": recall}


def save_run(
    model: PreTrainedModel,
    out: str | Path,
    record: dict[str, Any],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | Path,
    overwrite: bool,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the checkpoint with its card, the recipe and the record of the run, and `files`: all at once or none.

    Args:
        source: what it was made of; what is multimodal in there comes along (see `save`).
    """
    written = files_of_run(record, recipe) | dict(files or {})
    save(model, out, tokenizer=tokenizer, overwrite=overwrite, files=written, inside=source)


def files_of_run(record: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """What stands beside the weights of a run: its recipe, its record and the card, as text by name."""
    return {
        "recipe.yaml": recipe.dump_yaml(),
        "run.json": json.dumps(RunRecord.checked(record), indent=2) + "\n",
        "README.md": model_card(record),
    }
