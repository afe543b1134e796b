"""From a cell to its figures: converted, trained where the cell says so, measured beside the original.

Statistics and calibrated conversions are kept in the work folder, as several cells begin with the same one.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from kvlatent.evaluation.quality import measure
from kvlatent.jobs.fingerprints import fingerprint
from kvlatent.jobs.progress import Progress
from kvlatent.model.families import attention_layers_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.planning.width_plan import plan
from kvlatent.selection.latent_config import choose
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import calibration_blocks, recall_share
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.saved_attention import restore_attention, write_attention
from kvlatent.workflows.steps import collect_statistics
from kvlatent.workflows.width_choice import measure_errors
from kvlatent_lab.study.grid_cells import MEASURED, Cell, choices_of, recipe_of
from kvlatent_lab.study.other_selections import SELECTIONS
from kvlatent_lab.study.subject import Subject

__all__ = [
    "collect_cell_statistics",
    "compare_losses",
    "convert_cell",
    "forget",
    "measure_cell",
    "measure_model",
    "name_conversion",
    "name_text",
    "train_cell",
]


def measure_cell(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """The figures of a cell: convert, train where tokens are given, measure."""
    model, on_the_way = train_cell(subject, cell, progress)
    figures = measure_model(subject, model, progress) | on_the_way
    if cell.per_layer:
        decoder, layers = model.get_decoder(), attention_layers_of(model.config)
        attentions = [parts_of(decoder, layer).attention for layer in layers]
        figures |= {f"planned_{side}": [getattr(a, side) for a in attentions] for side in ("d_qk", "d_vo")}
    return figures


def convert_cell(subject: Subject, cell: Cell, progress: Progress) -> PreTrainedModel:
    """The latent model of a cell before any training; the original stays untouched.

    Raises:
        ValueError: the widths do not fit the model.
    """
    choices = choices_of(cell, subject.recipe)
    shared: dict[str, Any] = {"choices": choices, "qk_norm": subject.recipe.conversion.qk_norm}
    if not choices.needs_statistics:
        return convert(subject.model, d_qk=cell.d_qk, d_vo=cell.d_vo, **shared, seed=cell.seed)

    def write(path: Path) -> None:
        statistics = collect_cell_statistics(subject, cell, progress)
        target = _target(subject, cell, statistics, progress)
        shared.update(statistics=statistics, seed=cell.seed, progress=progress)
        write_attention(convert(subject.model, **target, **shared), path)

    name = f"{name_conversion(subject, cell)}.safetensors"
    return restore_attention(subject.model, subject.folder.shared_file(name, write))


def collect_cell_statistics(subject: Subject, cell: Cell, progress: Progress) -> Statistics:
    """Over the calibration blocks that the cell's seed draws, as many and as its recipe and its alignment say."""

    def write(path: Path) -> None:
        statistics, _ = collect_statistics(
            subject.model,
            subject.tokenizer,
            subject.train_blocks,
            recipe_of(cell, subject.recipe),
            progress,
            learns=choices_of(cell, subject.recipe).learns_from_text,
        )
        statistics.save(path, overwrite=True)

    name = f"statistics-{name_text(subject, cell)}.safetensors"
    return Statistics.load(subject.folder.shared_file(name, write))


def name_text(subject: Subject, cell: Cell) -> str:
    """A name that cells with the same calibration blocks share."""
    recipe = recipe_of(cell, subject.recipe)
    blocks = recipe.calibration.blocks
    some = "" if blocks == subject.recipe.calibration.blocks else f"-blocks{blocks}"
    learns = choices_of(cell, subject.recipe).learns_from_text
    share = recall_share(subject.train_blocks, recipe, learns=learns)
    return f"seed{cell.seed}{some}" + (f"-recall{share:g}" if share else "")


def _target(subject: Subject, cell: Cell, statistics: Statistics, progress: Progress) -> dict[str, Any]:
    """What `convert` shall build: the cell's widths, or widths a layer, or the pairs that another paper's rule keeps."""
    choices = choices_of(cell, subject.recipe)
    if cell.per_layer:
        share = (cell.d_qk + cell.d_vo) / (2 * statistics.head_dim)
        measured = None
        if cell.extra.get("widths") == MEASURED:
            recipe = recipe_of(cell, subject.recipe)
            measured = measure_errors(subject.model, statistics, choices, recipe, progress, per_layer=True)
        told: dict[str, Any] = {"table": choices.table, "aligned": choices.align > 0, "measured": measured}
        widths = plan(statistics, share, per_layer=True, **told)
        return {"d_qk": widths.d_qk, "d_vo": widths.d_vo}
    if (order := SELECTIONS.get(cell.extra.get("keys", ""))) is None:
        return {"d_qk": cell.d_qk, "d_vo": cell.d_vo}
    blocks = calibration_blocks(
        subject.train_blocks,
        recipe_of(cell, subject.recipe),
        subject.tokenizer,
        learns=choices.learns_from_text,
    )
    ranked = subject.remembered(
        f"pairs-{cell.extra['keys']}-{name_text(subject, cell)}",
        lambda: order(subject.model, blocks, cell.seed),
    )
    pairs = tuple(tuple(tuple(sorted(head[: cell.d_qk // 2])) for head in layer) for layer in ranked)
    norm = subject.recipe.conversion.qk_norm
    return {"config": choose(subject.model.config, cell.d_qk, cell.d_vo, choices, qk_norm=norm, pairs=pairs)}


def name_conversion(subject: Subject, cell: Cell) -> str:
    """A name that cells with the same conversion share."""
    about = {"widths": [cell.d_qk, cell.d_vo], "seed": cell.seed, "extra": dict(cell.extra)}
    about |= {"per_layer": True} if cell.per_layer else {}
    about |= {key: value for key, value in cell.recipe.items() if key.startswith("calibration.")}
    return f"converted-{fingerprint(about | asdict(choices_of(cell, subject.recipe)))[:16]}"


def train_cell(
    subject: Subject, cell: Cell, progress: Progress, latent: PreTrainedModel | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The latent model of a cell after its stages, and what was measured on the way.

    Args:
        latent: converted already; None converts as the cell says.

    Returns:
        The model as it would be exported, in the original's dtype, and the figures "tokens_trained",
        "training_seconds", "converted_ratio", and "stage1_ratio" where stage II follows stage I; none without training.
    """
    latent = convert_cell(subject, cell, progress) if latent is None else latent
    if not cell.stage1 + cell.stage2:
        return latent.requires_grad_(False).eval(), {}
    recipe = recipe_of(cell, subject.recipe)
    figures: dict[str, Any] = {
        "converted_ratio": subject.remembered(
            f"ratio-{name_conversion(subject, cell)}", lambda: _measure_ratio(subject, latent)
        ),
        "tokens_trained": 0,
        "training_seconds": 0.0,
    }
    prepare_for_training(latent, recipe)
    for stage, tokens in ((1, cell.stage1), (2, cell.stage2)):
        if not tokens:
            continue
        summary = train_stage(
            latent,
            subject.model,
            stage,
            subject.train_blocks,
            recipe,
            _training_folder(subject, cell) / f"stage{stage}",
            device=subject.device,
            progress=progress,
        )
        figures["tokens_trained"] += summary["tokens"]
        figures["training_seconds"] += round(60 * summary["minutes"], 2)
        figures[f"stage{stage}_loss"] = summary["last_loss"]
        if stage == 1 and cell.stage2:
            figures["stage1_ratio"] = _measure_ratio(subject, merged_copy(latent, subject.dtype))
    return merged_copy(latent, subject.dtype), figures


def _training_folder(subject: Subject, cell: Cell) -> Path:
    return subject.folder.work / "training" / cell.name


def forget(subject: Subject, cell: Cell) -> None:
    """Delete what a finished cell needed to go on after a kill."""
    shutil.rmtree(_training_folder(subject, cell), ignore_errors=True)


def measure_model(
    subject: Subject, model: PreTrainedModel, progress: Progress, part: str = "reported"
) -> dict[str, Any]:
    """Figures of a latent model on a part of the text, beside the original's.

    Returns:
        perplexity, standard_error, loss (nats a token), tokens, original_perplexity, original_loss, ratio,
        ratio_standard_error (of paired blocks; both errors are left out for a single block), cache_bytes_per_token and
        original_cache_bytes_per_token (read off the live caches), cache_ratio.
    """
    blocks = subject.blocks(part)
    original, reference = subject.original(part)
    step = progress.step("measure", len(blocks), tokens=subject.block_size)
    with subject.precision():
        figures, result = measure(model, blocks, progress=step.to)
    size, whole = figures["cache_bytes_per_token"], original["cache_bytes_per_token"]
    compared = compare_losses(result, reference) | {
        "original_perplexity": original["perplexity"],
        "original_loss": original["loss"],
        "cache_bytes_per_token": size,
        "original_cache_bytes_per_token": whole,
        "cache_ratio": size / whole,
    }
    return compared


def compare_losses(result: Perplexity, reference: Perplexity) -> dict[str, Any]:
    """Perplexity, and its ratio to a reference on the same blocks; errors only where there are several blocks."""
    ratio, error = perplexity_ratio(result, reference)
    compared = {
        "perplexity": result.perplexity,
        "standard_error": result.standard_error,
        "loss": result.loss,
        "tokens": result.tokens,
        "ratio": ratio,
        "ratio_standard_error": error,
    }
    return {name: value for name, value in compared.items() if value is not None}


def _measure_ratio(subject: Subject, model: PreTrainedModel) -> float:
    """Perplexity over the original's on the reported text, nothing else."""
    with subject.precision():
        result = perplexity(model, subject.blocks())
    return perplexity_ratio(result, subject.original()[1])[0]
