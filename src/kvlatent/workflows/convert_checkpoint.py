"""A conversion alone, from checkpoint to checkpoint: with text or statistics calibrated, measured where there is text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel

from kvlatent.checkpoints.card import model_card
from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.quality import evaluate
from kvlatent.jobs.atomic import prepare_output
from kvlatent.jobs.devices import working_dtype
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import command_line, environment
from kvlatent.selection.statistics import Statistics
from kvlatent.text.documents import resolve
from kvlatent.text.parts import Texts, check_sources, read_texts, seen_share
from kvlatent.training.trainable import merged_copy
from kvlatent.workflows.compress_checkpoint import EVALUATION_TOKENS, Announce, inputs_of, silent, spoken
from kvlatent.workflows.run_plan import Plan, plan_run
from kvlatent.workflows.run_record import RunRecord
from kvlatent.workflows.settings import PlanOptions
from kvlatent.workflows.steps import Progress, gathered, made, reused, settled

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    statistics: str | Path | None = None,
    eval_tokens: int = EVALUATION_TOKENS,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Announce | None = None,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Convert `model` and save it untrained, in the original's dtype.

    Args:
        model, out, overwrite, dry_run, progress, announce: as for `compress`.
        data: text to calibrate on, less a part that is held out to measure on. A preset that looks at no text measures
            on all of it. None, without `statistics`, falls back to what the weights alone say.
        eval_data: another text to measure on.
        statistics: file of an earlier calibration of this model, instead of `data`.
        eval_tokens: measure on at most that many tokens.
        options: see `PlanOptions`; the stages are "none" here.

    Returns:
        The JSON-able record that is written as `out/run.json`; or the plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    options["stages"] = "none"
    plan = plan_run(
        model,
        has_text=data is not None or statistics is not None,
        is_measured=data is not None or eval_data is not None,
        **options,
    )
    files = {"data": data, "eval_data": eval_data, "statistics": statistics}
    inputs = inputs_of({"model": model, **files}, options)
    place = prepare_output(out, overwrite, inputs)
    check_sources(data, statistics, eval_data, calibrates=plan.calibrates)
    if dry_run:
        return {"plan": plan.summary()}
    sha256 = _hashes(files)
    record: dict[str, Any] = {
        "command": command_line(
            "convert", model, spoken({**files, "out": place}, {**options, "stages": None})
        ),
        "plan": plan.summary(),
        "source": lineage(model),
        "sha256": {"model": identity(model), **sha256},
        **environment(plan.device),
    }
    report = progress or silent
    report("load", 0, 0, "")
    dtype = working_dtype(plan.recipe.dtype, plan.device) if plan.calibrates else None
    original = load_model(model, dtype=dtype, device=plan.device).requires_grad_(False)
    tokenizer = load_tokenizer(model, original.config)
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as cache:
        texts = read_texts(
            plan.recipe,
            tokenizer,
            original.config,
            data,
            eval_data,
            eval_tokens=eval_tokens,
            cache_dir=cache,
            calibrates=plan.calibrates,
        )
        if announce is not None:
            announce(record["plan"])
        found, record["calibration"] = _statistics(plan, original, texts, statistics, report)
        plan, predicted = settled(plan, found)
        latent, conversion = made(original, plan, found, report)
        record |= {"plan": plan.summary(), "conversion": conversion | {"predicted": predicted}}
        exported = merged_copy(latent, plan.stored_dtype)
        record["figures"] = _figures(plan, original, exported, texts, report)
    written = {
        "recipe.yaml": plan.recipe.dump_yaml(),
        "run.json": json.dumps(RunRecord.checked(record), indent=2) + "\n",
    }
    save(exported, place, tokenizer=tokenizer, card=model_card(record), overwrite=overwrite, files=written)
    return record


def _hashes(files: dict[str, Any]) -> dict[str, str | None]:
    """What the files hold.

    Raises:
        FileNotFoundError: a text is not there.
        ValueError: it cannot be read, or the figures would be of the text that was calibrated on.
    """
    for source in (files["data"], files["eval_data"]):
        if source is not None:
            resolve(source)
    sha256 = {name: None if file is None else identity(file) for name, file in files.items()}
    if sha256["data"] is not None and sha256["data"] == sha256["eval_data"]:
        raise ValueError(
            "--eval-data is the text to calibrate on; leave it out to measure on a held-out part, or give another file"
        )
    return sha256


def _statistics(
    plan: Plan, original: PreTrainedModel, texts: Texts, path: str | Path | None, progress: Progress
) -> tuple[Statistics | None, dict[str, Any] | None]:
    """What the conversion looks at, and the figures of the calibration; None where it looks at nothing."""
    if not plan.calibrates:
        return None, None
    if path is None:
        assert texts.train is not None
        return gathered(original, texts.train, plan.recipe, progress)
    statistics, figures = reused(path, original)
    if texts.held_out is not None:
        figures["seen_share"] = seen_share(texts.held_out, statistics.input_ids)
    return statistics, figures


def _figures(
    plan: Plan, original: PreTrainedModel, exported: PreTrainedModel, texts: Texts, progress: Progress
) -> dict[str, Any]:
    """What was measured of both models, in the dtype that they run in."""
    if texts.held_out is None:
        return {}
    dtype = getattr(torch, working_dtype(plan.recipe.dtype, plan.device))
    pair = merged_copy(exported, dtype), merged_copy(original, dtype)
    report = evaluate(pair[0], texts.held_out, against=pair[1], progress=progress)
    ratio = {name: report[name] for name in ("ratio", "ratio_standard_error")}
    return {"original": report["original"], "latent": report["latent"] | ratio}
