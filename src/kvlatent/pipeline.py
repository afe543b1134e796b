"""`compress`: a checkpoint and a text in, a trained, measured, loadable latent checkpoint out.

Steps, in order: plan; measure the original; convert and measure; stage I and measure; stage II; merge, measure what
is written, save. Each step leaves its figures in the workspace beside the output, so the whole can be killed anywhere
and called again. The output directory appears in one rename at the very end.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from .budget import Plan, PlanOptions, plan_run, working_dtype
from .card import model_card
from .conversion import convert
from .data import evaluation_blocks
from .data.text import resolve
from .evaluation import evaluate
from .hub import load_model, load_tokenizer, save
from .output import prepare_output
from .record import command_line, environment, read_record
from .run import Progress, Run
from .training.trainable import merged_copy
from .workspace import Workspace, fingerprint, identity

__all__ = ["Progress", "compress", "convert_checkpoint"]

_EVALUATION_TOKENS = 65_536

Announce = Callable[[dict[str, Any]], None]
"""Called with the plan once every argument, the model and the text have passed their checks, before the work."""


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
    announce: Announce | None = None,
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
        progress, announce: see `Progress` and `Announce`.
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
    # The place first, as it may hold the finished run; then what it holds.
    place = prepare_output(out, overwrite=True)
    decides = _decides(plan, model, data, eval_data, eval_tokens)
    workspace = Workspace(place, decides)
    if (finished := _finished(place, workspace)) is not None:
        return finished
    prepare_output(out, overwrite)
    for source in (data, eval_data):
        if source is not None:
            resolve(source)
    workspace.open(overwrite=overwrite)
    record = {
        "command": command_line("compress", model, _spoken(data, place, eval_data, options)),
        "fingerprint": fingerprint(workspace.plan),
        "plan": plan.summary(),
        "sha256": {name: decides[name] for name in ("model", "data", "eval_data")},
        **environment(plan.device),
    }
    run = Run(plan, workspace, progress or _silent)
    try:
        run.prepare(model, data, eval_data, eval_tokens)
        if announce is not None:
            announce(record["plan"])
        result = run.all_steps(record, place, overwrite)
    except BaseException:
        if not workspace.has_work():
            workspace.remove()
        raise
    workspace.remove()
    return result


def _decides(
    plan: Plan, model: str | Path, data: str | Path, eval_data: str | Path | None, eval_tokens: int
) -> dict[str, Any]:
    """Everything that decides the result of a run.

    Raises:
        ValueError: the figures would be of the text that was trained on.
    """
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
    if decides["data"] == decides["eval_data"]:
        raise ValueError(
            "--eval-data is the training text; leave it out to measure on a held-out part, or give another file"
        )
    return decides


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
    try:
        found = read_record(out / "run.json") if workspace.is_ours() else None
    except ValueError:  # damaged, so `out` is not that run's
        return None
    if found is None or found.get("fingerprint") != fingerprint(workspace.plan):
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
    announce: Announce | None = None,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Convert `model` and save it untrained, in the original's dtype.

    Args:
        model, out, overwrite, dry_run, progress, announce: as for `compress`.
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
    place = prepare_output(out, overwrite)
    if dry_run:
        return {"plan": plan.summary()}
    if data is not None:
        resolve(data)
    original = load_model(model, device=plan.device)
    tokenizer = load_tokenizer(model, original.config)
    record: dict[str, Any] = {
        "command": command_line("convert", model, _spoken(data, place, None, {**options, "stages": None})),
        "plan": plan.summary(),
        "sha256": {"model": identity(model), "data": None if data is None else identity(data)},
        **environment(plan.device),
        "figures": {},
    }
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as cache:
        blocks = None if data is None else _blocks(plan, original, tokenizer, data, eval_tokens, cache)
        if announce is not None:
            announce(record["plan"])
        latent = convert(original, plan.latent)
        if blocks is not None:
            dtype = getattr(torch, working_dtype(plan.recipe.dtype, plan.device))
            pair = merged_copy(latent, dtype), merged_copy(original, dtype)
            report = evaluate(pair[0], blocks, against=pair[1], progress=progress)
            ratio = {name: report[name] for name in ("ratio", "ratio_standard_error")}
            record["figures"] = {"original": report["original"], "latent": report["latent"] | ratio}
    files = {"recipe.yaml": plan.recipe.dump_yaml(), "run.json": json.dumps(record, indent=2) + "\n"}
    save(latent, place, tokenizer=tokenizer, card=model_card(record), overwrite=overwrite, files=files)
    return record


def _blocks(plan: Plan, model: Any, tokenizer: Any, data: str | Path, eval_tokens: int, cache: str) -> Any:
    """The start of a text as blocks that fit the model's context."""
    section = plan.recipe.data
    limit = getattr(model.config, "max_position_embeddings", None) or section.block_size
    return evaluation_blocks(
        data,
        tokenizer,
        min(section.block_size, limit),
        cache_dir=cache,
        separator=section.separator,
        text_field=section.text_field,
        max_tokens=max(eval_tokens, section.block_size),
    )
