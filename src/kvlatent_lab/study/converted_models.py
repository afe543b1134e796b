"""The model of a cell: converted, and trained where the cell says so.

Statistics and calibrated conversions are kept in the work folder, as several cells begin with the same one.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.fingerprints import fingerprint
from kvlatent.selection.statistics import Statistics
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.steps import Progress, collect_statistics, restore_attention, write_attention
from kvlatent_lab.study.grid_cells import Cell, answers, recipe_of
from kvlatent_lab.study.measuring import ratio_of
from kvlatent_lab.study.subject import Subject

__all__ = ["converted", "forget", "trained"]


def statistics_of(subject: Subject, cell: Cell, progress: Progress) -> Statistics:
    """Statistics over the calibration blocks that the cell's seed draws."""
    path = subject.folder.work / f"statistics-seed{cell.seed}.safetensors"
    with subject.folder.lock(path.stem):
        if not path.is_file():
            recipe = recipe_of(cell, subject.recipe)
            statistics, _ = collect_statistics(subject.model, subject.train_blocks, recipe, progress)
            statistics.save(path, overwrite=True)
    return Statistics.load(path)


def converted(subject: Subject, cell: Cell, progress: Progress) -> PreTrainedModel:
    """The latent model of a cell before any training; the original stays untouched.

    Raises:
        ValueError: the widths do not fit the model.
    """
    choices = answers(cell, subject.recipe)
    sizes: dict[str, Any] = {"d_qk": cell.d_qk, "d_vo": cell.d_vo, "choices": choices}
    sizes["qk_norm"] = subject.recipe.conversion.qk_norm
    if not choices.needs_statistics:
        return convert(subject.model, **sizes, seed=cell.seed)
    path = subject.folder.work / f"{_conversion(subject, cell)}.safetensors"
    with subject.folder.lock(path.stem):
        if not path.is_file():
            statistics = statistics_of(subject, cell, progress)

            def report(step: str, done: int, total: int) -> None:
                progress(step, done, total, "")

            latent = convert(subject.model, **sizes, statistics=statistics, seed=cell.seed, progress=report)
            write_attention(latent, path)
    return restore_attention(subject.model, path)


def _conversion(subject: Subject, cell: Cell) -> str:
    """A name that cells with the same conversion share."""
    about = {"widths": [cell.d_qk, cell.d_vo], "seed": cell.seed, "extra": dict(cell.extra)}
    return f"converted-{fingerprint(about | asdict(answers(cell, subject.recipe)))[:16]}"


def trained(
    subject: Subject, cell: Cell, progress: Progress, latent: PreTrainedModel | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The latent model of a cell after its stages, and what was measured on the way.

    Args:
        latent: converted already; None converts as the cell says.

    Returns:
        The model as it would be exported, in the original's dtype, and the figures "tokens_trained",
        "training_seconds", "converted_ratio", and "stage1_ratio" where stage II follows stage I; none without training.
    """
    latent = converted(subject, cell, progress) if latent is None else latent
    if not cell.stage1 + cell.stage2:
        return latent.requires_grad_(False).eval(), {}
    recipe = recipe_of(cell, subject.recipe)
    figures: dict[str, Any] = {
        "converted_ratio": subject.remembered(
            f"ratio-{_conversion(subject, cell)}", lambda: ratio_of(subject, latent)
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
            _place(subject, cell) / f"stage{stage}",
            device=subject.device,
            progress=lambda number, done, total, speed, loss: progress(
                f"stage {'I' * number}", done, total, f"{speed:,.0f} tokens/s, loss {loss:.4f}"
            ),
        )
        figures["tokens_trained"] += summary["tokens"]
        figures["training_seconds"] += round(60 * summary["minutes"], 2)
        figures[f"stage{stage}_loss"] = summary["last_loss"]
        if stage == 1 and cell.stage2:
            figures["stage1_ratio"] = ratio_of(subject, _exported(latent, subject.dtype))
    return _exported(latent, subject.dtype), figures


def _exported(latent: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return merged_copy(latent, dtype)


def _place(subject: Subject, cell: Cell) -> Path:
    return subject.folder.work / "training" / cell.name


def forget(subject: Subject, cell: Cell) -> None:
    """Delete what a finished cell needed to go on after a kill."""
    shutil.rmtree(_place(subject, cell), ignore_errors=True)
