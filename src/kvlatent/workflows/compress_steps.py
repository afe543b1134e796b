"""The steps of one `compress`: each leaves its figures in the workspace, and is not repeated where they are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.load import check_block_size
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.evaluation.quality import compare, measure
from kvlatent.evaluation.recall import compare_recall
from kvlatent.jobs.devices import precision, working_dtype
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import joined_metrics
from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import TextReader, Texts, read_texts
from kvlatent.training.resume import JOURNAL
from kvlatent.training.stages import train_stage
from kvlatent.training.teacher_store import TeacherStore
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.foreseen_steps import expect_steps
from kvlatent.workflows.healing import CONVERSION_SHARE, Healing, part_checked
from kvlatent.workflows.minutes import Budget, noted, tokens_to_measure
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.saved_attention import restore_attention, write_attention
from kvlatent.workflows.steps import (
    calibrate_or_load,
    convert_and_report,
    explain_layers,
    load_original,
    measure_copying,
    save_run,
)
from kvlatent.workflows.timed_conversion import convert_in_minutes, resume_conversion
from kvlatent.workflows.width_choice import resolve_widths

__all__ = ["CompressRun"]


class CompressRun:
    """One `compress` in flight: what is loaded, and the steps."""

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        plan: Plan,
        workspace: WorkDirectory,
        progress: Progress,
        model: str | Path,
        budget: Budget | None,
        *,
        searches: bool,
        store: TeacherStore | None = None,
        allow_change: bool = False,
    ) -> None:
        self.store = store  # to train stage II from, without the original
        self.plan, self.workspace, self.progress, self.budget = plan, workspace, progress, budget
        self.source = model
        self.allow_change = allow_change  # of the stages, in the middle
        self.searches = searches  # the rate of stage II, within a budget
        self.checked: Dataset | None = None  # blocks to decide on
        self.sentences: list[str] = []  # for the user
        dtype = working_dtype(plan.recipe.dtype, plan.device, plan.stored_dtype)
        self.original, self.tokenizer = load_original(model, dtype, plan.device, progress)
        self.dtype = self.original.dtype

    def read(self, data: str | Path, eval_data: str | Path | None, eval_tokens: int) -> Texts:
        """Bring the texts into blocks."""
        check_block_size(self.original.config, self.plan.recipe.data.block_size)
        reader = TextReader(
            self.plan.recipe,
            self.tokenizer,
            self.original.config,
            self.workspace.path / "data",
            progress=self.progress,
        )
        calibrates = self.plan.calibrates
        texts = read_texts(
            reader, data, eval_data, eval_tokens=eval_tokens, calibrates=calibrates, trains=True
        )
        if self.budget is not None and self.plan.stages:
            texts, self.checked = part_checked(texts, reader.block_size)
        return texts

    def all_steps(
        self, texts: Texts, statistics: str | Path | None
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Calibrate, measure, convert, train; returns the model to write, and what to record of the steps."""
        seen, calibration = self._calibrate(texts, statistics)
        figures: dict[str, Any] = {"original": self._measure("original", self.original, texts)}
        latent, conversion = self._convert(seen, texts)
        figures["converted"] = self._measure("converted", latent, texts)
        training: dict[str, Any] = {}
        if self.plan.stages:
            prepare_for_training(latent, self.plan.recipe)
        if self.budget is not None and self.plan.stages:
            training = self._heal(latent, texts)
        for stage in self.plan.stages if self.budget is None else ():
            training[f"stage{stage}"] = self._train(latent, stage, texts)
            if stage != self.plan.stages[-1]:
                figures[f"stage{stage}"] = self._measure(f"stage{stage}", latent, texts)
        exported = merged_copy(latent, self.plan.stored_dtype)
        figures["latent"] = self._measure("latent", _as(exported, self.dtype), texts)
        minutes = {} if self.budget is None else {"minutes": self.budget.summary(conversion)}
        return exported, {
            **minutes,
            "plan": dataclasses.replace(self.plan, minutes=None).summary(),
            "calibration": calibration,
            "conversion": conversion,
            "training": training,
            "figures": compare_recall({name: _public(value) for name, value in figures.items()}),
        }

    def _calibrate(
        self, texts: Texts, file: str | Path | None
    ) -> tuple[Statistics | None, dict[str, Any] | None]:
        """Statistics and the calibration's figures, from the workspace where they are known already."""
        kept = self.workspace.path / "statistics.safetensors"
        if (known := self.workspace.done("calibration")) is not None:
            return Statistics.load(kept), known
        self._expect(texts, file)
        with noted(self.budget, "calibration", self.progress) as told:
            statistics, figures = calibrate_or_load(
                self.plan, self.original, self.tokenizer, texts, file, told
            )
        if statistics is None or figures is None:
            return None, None
        statistics.save(kept, overwrite=True)
        return statistics, self.workspace.finish("calibration", figures)

    def _expect(self, texts: Texts, file: str | Path | None) -> None:
        """Refuse a budget that is not enough for one step, before anything long."""
        if self.budget is None or self.workspace.done("original") is not None:
            return
        tokens = tokens_to_measure(texts.held_out, models=3, recalls=2)
        given = self.budget, self.original, self.plan, texts.train, file, self.progress
        expect_steps(*given, tokens_to_measure=tokens)

    def _convert(self, statistics: Statistics | None, texts: Texts) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The latent model, put together again from its tensors where a calibrated conversion has finished."""
        file = self.workspace.path / "attention.safetensors"
        if (known := self.workspace.done("conversion")) is None:
            with noted(self.budget, "widths", self.progress) as told:
                self.plan, predicted = resolve_widths(self.plan, self.original, statistics, told)
            latent, figures = self._convert_now(statistics, texts)
            figures["predicted"] = predicted
            if statistics is None:
                return latent, figures
            write_attention(latent, file)
            return latent, self.workspace.finish("conversion", figures)
        latent = restore_attention(self.original, file)
        self.plan = dataclasses.replace(self.plan, widths=latent_config_of(latent.config).widths)
        if self.budget is not None:
            self.plan = resume_conversion(self.plan, self.budget, known)
        if self.plan.explain and statistics is not None and "layers" not in known:
            known |= explain_layers(self.original, latent, statistics, self.progress)
            self.workspace.finish("conversion", known)
        return latent, known

    def _convert_now(
        self, statistics: Statistics | None, texts: Texts
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        if self.budget is None or statistics is None:
            return convert_and_report(self.original, self.plan, statistics, self.progress)
        self.plan, latent, figures = convert_in_minutes(
            self.original,
            self.plan,
            statistics,
            self.budget,
            self.progress,
            tokens_to_measure=tokens_to_measure(texts.held_out, models=2, recalls=1),
            share=CONVERSION_SHARE if self.plan.stages else 1.0,
            decide=self._decide,
        )
        return latent, figures

    def _decide(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was decided, by an earlier call where it came so far."""
        known = self.workspace.done(name)
        return self.workspace.finish(name, make()) if known is None else known

    def _heal(self, latent: PreTrainedModel, texts: Texts) -> dict[str, Any]:
        """Stage II as a budget has room for it; returns its summary by its name, or nothing where there is none."""
        assert self.budget is not None and self.checked is not None and texts.train is not None
        healing = Healing(
            latent,
            self.original,
            texts.train,
            self.checked,
            self.plan.recipe,
            self.budget,
            self.workspace.path,
            self.plan.device,
            self.progress,
        )
        tokens = tokens_to_measure(texts.held_out, models=1, recalls=1)
        recipe, summary, sentence = healing.run(tokens, self.searches, self._decide)
        self.sentences += [] if sentence is None else [sentence]
        if recipe is None and not self.plan.calibrates:
            self.budget.refuse(summary["needed_seconds"])
        if recipe is None:
            self.plan = dataclasses.replace(self.plan, stages=())
            return {}
        self.plan = dataclasses.replace(self.plan, recipe=recipe)
        return {"stage2": summary}

    def _measure(self, name: str, model: PreTrainedModel, texts: Texts) -> dict[str, Any]:
        """Figures of one model, from the workspace where they are known already."""
        if (known := self.workspace.done(name)) is not None:
            return known
        assert texts.held_out is not None
        blocks = texts.held_out
        step = self.progress.step(f"measure {name}", len(blocks), tokens=len(blocks[0]["input_ids"]))
        with precision(self.plan.device, str(self.dtype).removeprefix("torch.")):
            figures, result = measure(model, blocks, progress=step.to)
            if name in ("original", "latent"):
                figures |= measure_copying(name, model, self.tokenizer, blocks, self.progress)
        if name != "original":
            original = self.workspace.done("original")
            assert original is not None
            figures |= compare(result, _revived(original["paired"]))
        return self.workspace.finish(name, {**figures, "paired": dataclasses.asdict(result)})

    def _train(self, latent: PreTrainedModel, stage: int, texts: Texts) -> dict[str, Any]:
        """Run one stage, or continue it, or put back what it had trained."""
        assert texts.train is not None
        if stage == 2:
            recipe = _within_widths(self.plan.recipe, latent, self.plan.kv)
            self.plan = dataclasses.replace(self.plan, recipe=recipe)
        if stage == 2 and self.store is not None:
            teacher: PreTrainedModel | TeacherStore = self.store
            del self.original  # what the latent model does not share of it leaves the memory
        else:
            teacher = self.original
        return train_stage(
            latent,
            teacher,
            stage,
            texts.train,
            self.plan.recipe,
            self.workspace.path / f"stage{stage}",
            device=self.plan.device,
            progress=self.progress,
            allow_change=self.allow_change,
        )

    def save(self, exported: PreTrainedModel, record: dict[str, Any], out: Path, overwrite: bool) -> None:
        """Write the checkpoint, with the journals of the stages joined."""
        self.progress.report("save")
        names = [f"stage{stage}" for stage in self.plan.stages]
        journals = [(name, self.workspace.path / name / JOURNAL) for name in names]
        files = {JOURNAL: joined_metrics(journals)} if journals else {}
        more: dict[str, Any] = {"source": self.source, "overwrite": overwrite, "files": files}
        save_run(exported, out, record, self.plan.recipe, self.tokenizer, **more)


def _within_widths(recipe: Recipe, latent: PreTrainedModel, kv: float) -> Recipe:
    """The recipe, whose shares to train of at most `kv`, which was asked for, are no wider than the widths that it gave."""
    config, layers = latent_config_of(latent.config), len(attention_layers_of(latent.config))
    own = config.widths.share(config.original_head_dim, layers)
    shares = recipe.stage2.nested_kv or []
    if not any(own < share <= kv for share in shares):
        return recipe
    kept = sorted({min(share, own) if share <= kv else share for share in shares})
    return Recipe.load(recipe, [f"stage2.nested_kv={kept}"])


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
