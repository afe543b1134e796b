"""The steps of one `compress`: load, calibrate, measure, convert, train, export. Each leaves its figures in the workspace.

A step whose figures are there is not repeated; a stage that was killed continues from its newest complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.card import model_card
from kvlatent.checkpoints.load import check_block_size, load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.evaluation.quality import compare, measure, precision, speedometer
from kvlatent.jobs.devices import working_dtype
from kvlatent.jobs.record import joined_metrics
from kvlatent.jobs.work_directory import Workspace
from kvlatent.selection.statistics import Statistics
from kvlatent.text.corpus import evaluation_blocks, prepare
from kvlatent.text.parts import first_blocks, seen_share
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.run_record import RunRecord
from kvlatent.workflows.steps import Progress, gathered, made, restored, reused, settled, write_attention

__all__ = ["Run"]


class Run:
    """One `compress` in flight: what is loaded, and the steps."""

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_blocks: Dataset
    held_out: Dataset

    def __init__(
        self, plan: Plan, workspace: Workspace, progress: Progress, statistics: str | Path | None = None
    ) -> None:
        self.plan, self.recipe, self.workspace, self.progress = plan, plan.recipe, workspace, progress
        self.statistics = statistics

    def prepare(
        self, model: str | Path, data: str | Path, eval_data: str | Path | None, eval_tokens: int
    ) -> None:
        """Load the original and its tokenizer, and bring the text into blocks."""
        plan, section = self.plan, self.recipe.data
        self.progress("load", 0, 0, "")
        self.original = load_model(
            model, dtype=working_dtype(self.recipe.dtype, plan.device), device=plan.device
        )
        self.original.requires_grad_(False).eval()
        self.tokenizer = load_tokenizer(model, self.original.config)
        check_block_size(self.original.config, section.block_size)
        shared: dict[str, Any] = {
            "cache_dir": self.workspace.path / "data",
            "vocab_size": self.original.config.vocab_size,
            "block_size": section.block_size,
            "separator": section.separator,
            "isolate": section.isolate,
            "text_field": section.text_field,
        }
        corpus = prepare(
            data,
            self.tokenizer,
            held_out=section.held_out if eval_data is None else 0.0,
            seed=self.recipe.seed,
            progress=lambda tokens: self.progress("tokenise", 0, 0, f"{tokens:,} tokens"),
            **shared,
        )
        assert corpus.train is not None
        self.train_blocks = corpus.train
        held_out = (
            corpus.held_out if eval_data is None else evaluation_blocks(eval_data, self.tokenizer, **shared)
        )
        if held_out is None:
            raise ValueError(
                "nothing is held out to measure on: data.held_out is 0; raise it, or pass --eval-data FILE"
            )
        self.held_out = first_blocks(held_out, eval_tokens, section.block_size)

    def all_steps(self, record: dict[str, Any], out: str | Path, overwrite: bool) -> dict[str, Any]:
        """Calibrate, measure, convert, train, export; returns the record that was saved."""
        statistics, calibration = self._calibrated()
        figures: dict[str, Any] = {"original": self._measured("original", self.original)}
        latent, conversion = self._converted(statistics)
        figures["converted"] = self._measured("converted", latent)
        training: dict[str, Any] = {}
        if self.plan.stages:
            prepare_for_training(latent, self.recipe)
        for stage in self.plan.stages:
            training[f"stage{stage}"] = self._train(latent, stage)
            if stage != self.plan.stages[-1]:
                figures[f"stage{stage}"] = self._measured(f"stage{stage}", latent)
        exported = merged_copy(latent, self.plan.stored_dtype)
        figures["latent"] = self._measured("latent", _as(exported, self.original.dtype))
        record = {
            **record,
            "plan": self.plan.summary(),
            "calibration": calibration,
            "conversion": conversion,
            "training": training,
            "figures": {name: _public(value) for name, value in figures.items()},
        }
        self._save(exported, record, out, overwrite)
        return record

    def _calibrated(self) -> tuple[Statistics | None, dict[str, Any] | None]:
        """Statistics and the calibration's figures, from the workspace where they are known already."""
        if not self.plan.calibrates:
            return None, None
        file = self.workspace.path / "statistics.safetensors"
        if (known := self.workspace.done("calibration")) is not None:
            return Statistics.load(file), known
        if self.statistics is None:
            statistics, figures = gathered(self.original, self.train_blocks, self.recipe, self.progress)
        else:
            statistics, figures = reused(self.statistics, self.original)
            figures["seen_share"] = seen_share(self.held_out, statistics.input_ids)
        statistics.save(file, overwrite=True)
        return statistics, self.workspace.finish("calibration", figures)

    def _converted(self, statistics: Statistics | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The latent model, put together again from its tensors where a calibrated conversion has finished."""
        self.plan, predicted = settled(self.plan, statistics)
        file = self.workspace.path / "attention.safetensors"
        if (known := self.workspace.done("conversion")) is not None:
            return restored(self.original, file), known
        latent, figures = made(self.original, self.plan, statistics, self.progress)
        figures["predicted"] = predicted
        if statistics is None:
            return latent, figures
        write_attention(latent, file)
        return latent, self.workspace.finish("conversion", figures)

    def _measured(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Figures of one model, from the workspace where they are known already."""
        if (known := self.workspace.done(name)) is not None:
            return known
        progress = speedometer(self.progress, f"measure {name}", self.held_out)
        with precision(self.plan.device, str(self.original.dtype).removeprefix("torch.")):
            figures, result = measure(model, self.held_out, progress=progress)
        if name != "original":
            original = self.workspace.done("original")
            assert original is not None
            figures |= compare(result, _revived(original["paired"]))
        return self.workspace.finish(name, {**figures, "paired": dataclasses.asdict(result)})

    def _train(self, latent: PreTrainedModel, stage: int) -> dict[str, Any]:
        """Run one stage, or continue it, or put back what it had trained."""
        return train_stage(
            latent,
            self.original,
            stage,
            self.train_blocks,
            self.recipe,
            self.workspace.path / f"stage{stage}",
            device=self.plan.device,
            progress=lambda number, done, total, speed, loss: self.progress(
                f"stage {'I' * number}", done, total, f"{speed:,.0f} tokens/s, loss {loss:.4f}"
            ),
        )

    def _save(
        self, exported: PreTrainedModel, record: dict[str, Any], out: str | Path, overwrite: bool
    ) -> None:
        stages = [
            (f"stage{stage}", self.workspace.path / f"stage{stage}" / "metrics.jsonl")
            for stage in self.plan.stages
        ]
        self.progress("save", 0, 0, "")
        files = {
            "recipe.yaml": self.recipe.dump_yaml(),
            "run.json": json.dumps(RunRecord.checked(record), indent=2) + "\n",
        }
        if stages:
            files["metrics.jsonl"] = joined_metrics(stages)
        save(
            exported, out, tokenizer=self.tokenizer, card=model_card(record), overwrite=overwrite, files=files
        )


def _public(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without the per-block sums that only the paired ratio needs."""
    return {name: value for name, value in figures.items() if name != "paired"}


def _as(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in another dtype, as a copy where that changes anything."""
    return model if model.dtype == dtype else merged_copy(model, dtype)


def _revived(saved: Mapping[str, Any]) -> Perplexity:
    """A `Perplexity` from its JSON form, which knows lists only."""
    fields: dict[str, Any] = dict(saved)
    fields |= {name: tuple(saved[name]) for name in ("block_losses", "block_tokens")}
    return Perplexity(**fields)
