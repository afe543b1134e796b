"""`compress`: a checkpoint and a text in, a trained, measured, loadable latent checkpoint out.

Steps, in order: plan; measure the original; convert and measure; stage I and measure; stage II; merge, measure what
is written, save. Each step leaves its figures in the workspace beside the output, so the whole can be killed anywhere
and called again. The output directory appears in one rename at the very end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from .budget import PlanOptions, plan_run, working_dtype
from .card import model_card
from .conversion import convert
from .evaluation import evaluate
from .hub import load_model, load_tokenizer, save
from .output import prepare_output
from .record import command_line, environment
from .run import Progress, Run
from .training.trainable import merged_copy
from .workspace import Workspace, fingerprint, identity

__all__ = ["Progress", "compress", "convert_checkpoint"]

_EVALUATION_TOKENS = 65_536


def compress(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    eval_data: str | Path | None = None,
    eval_tokens: int = _EVALUATION_TOKENS,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Compress `model` with text from `data` and save the result in `out`.

    A call that was killed continues when it is repeated with the same arguments.

    Args:
        model: directory or hub id of the original.
        data: training text: .txt, .jsonl, .json, .parquet or a hub data set.
        out: directory to write; `out.partial` beside it holds unfinished work.
        eval_data: text to measure on; None takes the part of `data` that is held out from training.
        eval_tokens: measure on at most that many tokens.
        overwrite: replace what `out` holds (at the end, in one rename) and unfinished work of other arguments.
        dry_run: return the plan and write nothing.
        progress: see `Progress`.
        options: `kv`, `d_qk`, `d_vo`, `preset`, `recipe`, `overrides`, `tokens`, `stages`, `device`, `dtype`, `seed`:
            see `plan_run`.

    Returns:
        The JSON-able record of the run, which is also written as `out/run.json`; or the plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    plan = plan_run(model, **options)
    if dry_run:
        prepare_output(out, overwrite)
        return {"plan": plan.summary()}
    decides = {
        "model": identity(model),
        "data": identity(data),
        "eval_data": None if eval_data is None else identity(eval_data),
        "eval_tokens": eval_tokens,
        "stages": list(plan.stages),
        "device": plan.device,
        "conversion": plan.latent.to_dict()["widths"],
        "recipe": plan.recipe.model_dump(mode="json"),
    }
    workspace = Workspace(out, decides)
    if (finished := _finished(Path(out), workspace)) is not None:
        return finished
    prepare_output(out, overwrite)
    workspace.open(overwrite=overwrite)
    record = {
        "command": command_line("compress", model, _spoken(data, out, eval_data, options)),
        "fingerprint": fingerprint(workspace.plan),
        "plan": plan.summary(),
        "sha256": {"model": decides["model"], "data": decides["data"]},
        **environment(plan.device),
    }
    run = Run(plan, workspace, progress or _silent)
    try:
        run.prepare(model, data, eval_data, eval_tokens)
        result = run.all_steps(record, out, overwrite)
    except BaseException:
        if not workspace.has_work():
            workspace.remove()
        raise
    workspace.remove()
    return result


def _silent(step: str, done: int, total: int, note: str) -> None:
    """The progress of a caller who did not ask for any."""


def _spoken(data: Any, out: Any, eval_data: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as the command line spells them."""
    named = {
        name: Path(value).name
        for name, value in (("data", data), ("out", out), ("eval_data", eval_data))
        if value
    }
    spelled = {("set" if name == "overrides" else name): value for name, value in options.items()}
    if spelled.get("recipe"):
        spelled["recipe"] = Path(spelled["recipe"])
    return named | spelled


def _finished(out: Path, workspace: Workspace) -> dict[str, Any] | None:
    """The record of a run that was killed after its output appeared and before its workspace went."""
    record = out / "run.json"
    if not (workspace.path.is_dir() and record.is_file()):
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    if found.get("fingerprint") != fingerprint(workspace.plan):
        return None
    workspace.remove()
    return found


def convert_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    eval_tokens: int = _EVALUATION_TOKENS,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Convert `model` and save it untrained, in the original's dtype.

    Args:
        model, out, overwrite, dry_run, progress: as for `compress`.
        data: text to measure the original and the converted model on; None measures nothing.
        eval_tokens: measure on at most that many tokens.
        options: as for `plan_run`; the stages are "none" here.

    Returns:
        The JSON-able record that is written as `out/run.json`; or the plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do.
    """
    options["stages"] = "none"
    plan = plan_run(model, **options)
    prepare_output(out, overwrite)
    if dry_run:
        return {"plan": plan.summary()}
    original = load_model(model, device=plan.device)
    tokenizer = load_tokenizer(model, original.config)
    latent = convert(original, plan.latent)
    record: dict[str, Any] = {
        "command": command_line("convert", model, _spoken(data, out, None, {**options, "stages": None})),
        "plan": plan.summary(),
        "sha256": {"model": identity(model), "data": None if data is None else identity(data)},
        **environment(plan.device),
        "figures": {},
    }
    if data is not None:
        section = plan.recipe.data
        dtype = getattr(torch, working_dtype(plan.recipe.dtype, plan.device))
        report = evaluate(
            merged_copy(latent, dtype),
            data,
            against=merged_copy(original, dtype),
            tokenizer=tokenizer,
            block_size=section.block_size,
            separator=section.separator,
            text_field=section.text_field,
            max_tokens=max(eval_tokens, section.block_size),
            progress=progress,
        )
        latent_figures = report["latent"] | {name: report[name] for name in ("ratio", "ratio_standard_error")}
        record["figures"] = {"original": report["original"], "latent": latent_figures}
    files = {"recipe.yaml": plan.recipe.dump_yaml(), "run.json": json.dumps(record, indent=2) + "\n"}
    save(latent, out, tokenizer=tokenizer, card=model_card(record), overwrite=overwrite, files=files)
    return record
