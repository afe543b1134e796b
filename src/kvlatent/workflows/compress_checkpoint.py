"""`compress`: a checkpoint and a text in, a trained, measured, loadable latent checkpoint out.

Steps, in order: plan; calibrate; measure the original; convert and measure; stage I and measure; stage II; merge,
measure what is written, save. Each step leaves its figures in the workspace beside the output, so the whole can be
killed anywhere and called again: a step whose figures are there is not repeated, a stage continues from its newest
complete checkpoint. The output directory appears in one rename at the very end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.checkpoints.load import check_block_size
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.evaluation.quality import compare, measure
from kvlatent.evaluation.recall import compare_recall
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.devices import precision, working_dtype
from kvlatent.jobs.fingerprints import fingerprint
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import joined_metrics
from kvlatent.jobs.work_directory import WorkDirectory, partial_of, prepare_place
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import TextReader, Texts, check_statistics, read_texts
from kvlatent.training.resume import JOURNAL
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.losses import judge_losses, warn_of_losses
from kvlatent.workflows.run_plan import Plan, plan_run
from kvlatent.workflows.run_record import read_record
from kvlatent.workflows.saved_attention import restore_attention, write_attention
from kvlatent.workflows.steps import (
    EVALUATION_TOKENS,
    Announce,
    calibrate_or_load,
    check_texts,
    convert_and_report,
    describe_run,
    explain_layers,
    hash_sources,
    load_original,
    measure_copying,
    options_as_typed,
    resolve_widths,
    save_run,
)

__all__ = ["compress"]


def compress(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    eval_data: str | Path | None = None,
    statistics: str | Path | None = None,
    eval_tokens: int = EVALUATION_TOKENS,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | Report | None = None,
    announce: Announce | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compress `model` with text from `data` and save the result in `out`.

    A call that was killed continues when it is repeated with the same arguments.

    Args:
        model: directory, hub id or GGUF file of the original.
        data: training text: .txt, .jsonl, .json, .parquet or a hub data set. The calibration looks at a sample of it.
        out: directory to write; `out.partial` beside it holds unfinished work.
        eval_data: text to measure on; None takes the part of `data` that is held out from training.
        statistics: file of an earlier calibration of this model, which is then not repeated.
        eval_tokens: measure on at most that many tokens.
        overwrite: replace what `out` holds (at the end, in one rename) and unfinished work of other arguments.
        dry_run: return the plan and write nothing.
        progress, announce: see `Progress` and `Announce`.
        options: see `RUN_OPTIONS`.

    Returns:
        The JSON-able record of the run, which is also written as `out/run.json`; or the plan. Where the held-out text says
        that users would not want the result, a sentence in its "warnings", which is a warning of Python's, too.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    plan = plan_run(model, **options)
    files = {"data": data, "eval_data": eval_data, "statistics": statistics}
    inputs = {"model": model, **files, "recipe": options.get("recipe")}
    if dry_run:
        prepare_place(out, overwrite, inputs)
        return {"plan": plan.summary()}
    check_texts(data, eval_data)
    # The place first, as it may hold the finished run; then what it holds.
    place = prepare_place(out, True, inputs)
    if statistics is not None:
        check_statistics(statistics, plan.calibrates)
    sha256 = hash_sources({"model": model, **files}, "training text")
    workspace = WorkDirectory(partial_of(place), {**sha256, "eval_tokens": eval_tokens, **_decisions(plan)})
    if (finished := _finished(place, workspace)) is not None:
        warn_of_losses(finished)
        return finished
    prepare_output(out, overwrite)
    workspace.open(overwrite=overwrite)
    typed = options_as_typed({**files, "out": place}, options)
    record = describe_run("compress", model, typed, sha256, plan.device)
    record["fingerprint"] = fingerprint(workspace.plan)
    try:
        run = _Run(plan, workspace, Progress.of(progress), model)
        texts = run.read(data, eval_data, eval_tokens)
        if announce is not None:
            announce(plan.summary())
        exported, results = run.all_steps(texts, statistics)
        record |= results
        replan = partial(plan_run, model)
        record["warnings"] = judge_losses("compress", record["figures"], run.plan, options, replan)
        run.save(exported, record, place, overwrite)
    except BaseException:
        if not workspace.has_work():
            workspace.remove()
        raise
    workspace.remove()
    warn_of_losses(record)
    return record


def _decisions(plan: Plan) -> dict[str, Any]:
    """What decides the result of a run, beside what it reads."""
    widths: dict[str, Any] = {"engine": plan.engine}
    if plan.widths is None:
        widths |= {"kv": plan.kv, "per_layer": plan.per_layer}
    else:
        widths |= plan.widths.to_dict()
    return {
        "stages": list(plan.stages),
        "device": plan.device,
        "conversion": widths,
        "recipe": plan.recipe.model_dump(mode="json"),
    }


def _finished(out: Path, workspace: WorkDirectory) -> dict[str, Any] | None:
    """The record of a run that was killed after its output appeared and before its workspace went."""
    try:
        record = read_record(out / "run.json") if workspace.is_ours() else None
    except ValueError:  # damaged, so `out` is not that run's
        return None
    if record is None or record.get("fingerprint") != fingerprint(workspace.plan):
        return None
    workspace.remove()
    return record


class _Run:
    """One `compress` in flight: what is loaded, and the steps."""

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, plan: Plan, workspace: WorkDirectory, progress: Progress, model: str | Path) -> None:
        self.plan, self.recipe, self.workspace, self.progress = plan, plan.recipe, workspace, progress
        dtype = working_dtype(plan.recipe.dtype, plan.device, plan.stored_dtype)
        self.original, self.tokenizer = load_original(model, dtype, plan.device, progress)

    def read(self, data: str | Path, eval_data: str | Path | None, eval_tokens: int) -> Texts:
        """Bring the texts into blocks."""
        check_block_size(self.original.config, self.recipe.data.block_size)
        reader = TextReader(
            self.recipe,
            self.tokenizer,
            self.original.config,
            self.workspace.path / "data",
            progress=self.progress,
        )
        calibrates = self.plan.calibrates
        return read_texts(
            reader, data, eval_data, eval_tokens=eval_tokens, calibrates=calibrates, trains=True
        )

    def all_steps(
        self, texts: Texts, statistics: str | Path | None
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Calibrate, measure, convert, train; returns the model to write, and what to record of the steps."""
        seen, calibration = self._calibrate(texts, statistics)
        figures: dict[str, Any] = {"original": self._measure("original", self.original, texts)}
        latent, conversion = self._convert(seen)
        figures["converted"] = self._measure("converted", latent, texts)
        training: dict[str, Any] = {}
        if self.plan.stages:
            prepare_for_training(latent, self.recipe)
        for stage in self.plan.stages:
            training[f"stage{stage}"] = self._train(latent, stage, texts)
            if stage != self.plan.stages[-1]:
                figures[f"stage{stage}"] = self._measure(f"stage{stage}", latent, texts)
        exported = merged_copy(latent, self.plan.stored_dtype)
        figures["latent"] = self._measure("latent", _as(exported, self.original.dtype), texts)
        return exported, {
            "plan": self.plan.summary(),
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
        statistics, figures = calibrate_or_load(
            self.plan, self.original, self.tokenizer, texts, file, self.progress
        )
        if statistics is None or figures is None:
            return None, None
        statistics.save(kept, overwrite=True)
        return statistics, self.workspace.finish("calibration", figures)

    def _convert(self, statistics: Statistics | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The latent model, put together again from its tensors where a calibrated conversion has finished."""
        file = self.workspace.path / "attention.safetensors"
        if (known := self.workspace.done("conversion")) is None:
            self.plan, predicted = resolve_widths(self.plan, self.original, statistics, self.progress)
            latent, figures = convert_and_report(self.original, self.plan, statistics, self.progress)
            figures["predicted"] = predicted
            if statistics is None:
                return latent, figures
            write_attention(latent, file)
            return latent, self.workspace.finish("conversion", figures)
        latent = restore_attention(self.original, file)
        self.plan = dataclasses.replace(self.plan, widths=latent_config_of(latent.config).widths)
        if self.plan.explain and statistics is not None and "layers" not in known:
            known |= explain_layers(self.original, latent, statistics, self.progress)
            self.workspace.finish("conversion", known)
        return latent, known

    def _measure(self, name: str, model: PreTrainedModel, texts: Texts) -> dict[str, Any]:
        """Figures of one model, from the workspace where they are known already."""
        if (known := self.workspace.done(name)) is not None:
            return known
        assert texts.held_out is not None
        blocks = texts.held_out
        step = self.progress.step(f"measure {name}", len(blocks), tokens=len(blocks[0]["input_ids"]))
        with precision(self.plan.device, str(self.original.dtype).removeprefix("torch.")):
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
        return train_stage(
            latent,
            self.original,
            stage,
            texts.train,
            self.recipe,
            self.workspace.path / f"stage{stage}",
            device=self.plan.device,
            progress=self.progress,
        )

    def save(self, exported: PreTrainedModel, record: dict[str, Any], out: Path, overwrite: bool) -> None:
        """Write the checkpoint, with the journals of the stages joined."""
        self.progress.report("save")
        names = [f"stage{stage}" for stage in self.plan.stages]
        journals = [(name, self.workspace.path / name / JOURNAL) for name in names]
        files = {JOURNAL: joined_metrics(journals)} if journals else {}
        save_run(exported, out, record, self.recipe, self.tokenizer, overwrite=overwrite, files=files)


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
