"""Accuracy on tasks by lm-eval, run on a model in memory: its own tasks by name, or yours from YAML files.

lm-eval reads the questions, scores the answers and computes the standard errors; here its tasks are found, its output
is kept off the screen, and its results become a plain dict in which every number says which metric it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.evaluation import check
from kvlatent.evaluation.check import CheckRequest, Settings
from kvlatent.evaluation.checks.task_loading import import_lm_eval, loaded_tasks
from kvlatent.evaluation.evidence import Figures
from kvlatent.evaluation.sequences import check_counts, context_limit, evaluation_mode, mean_and_error
from kvlatent.jobs.progress import Step
from kvlatent.jobs.record import with_error

__all__ = ["CHECK", "check_tasks", "compare_tasks", "run_tasks"]

_BATCH = 8
_RESAMPLES = 1000  # for errors without a closed form: 2 % off; lm-eval's 100,000 take hours on long data
_HAYSTACK = 4096  # tokens of a synthetic haystack that nobody chose, lm-eval's own number
_COUNTS = ("samples", "shots")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    answers: bool = False,
) -> dict[str, Any]:
    """Run lm-eval tasks, groups or tags on a loaded model, original or latent.

    The model's mode and the tokenizer are left as they were; the global random states of Python, NumPy and torch are
    set to `seed`. Reading lm-eval's own list of tasks takes about 30 seconds, once a process; names that are all under
    `include_path` do without. Question and answer take no more tokens than the model's context, what is longer loses
    its start; synthetic haystacks (`niah_*`, `ruler`) are as long, at most 4096.

    Args:
        include_path: a folder of YAML tasks, which stand before lm-eval's own of the same name.
        limit: look at the first so many samples of a task; None looks at all.
        batch_size: requests run together; None takes 8.
        seed: of the examples drawn, and of whatever a task draws.
        answers: keep the score of every question, by which two models are compared question by question.

    Returns:
        {"tasks": {name: {metric: value, metric + "_stderr": value or None, "samples": n, "shots": n}}, "lm_eval":
        version}, and with `answers` "answers": {name: {metric: [score of each question]}}. Multiple choice always has "acc" and "acc_norm" (log-likelihood over the answer's characters), None
        where the task does not define one. A metric behind a named filter is "metric[filter]".

    Raises:
        ValueError: lm-eval or a task's package is missing, no such task, its data cannot be fetched, or answers longer
            than the model's context.
        TypeError: one string in place of several names.
    """
    _check(tasks, limit, batch_size, seed)
    length = context_limit(model.config) or _HAYSTACK
    evaluator, harness = import_lm_eval()
    own = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
    if own.pad_token_id is not None and own.pad_token_id >= model.config.vocab_size:
        own.pad_token = own.eos_token  # padding is masked, but the embedding must have its row
    quiet = loaded_tasks(tokenizer, tasks, include_path, length, min(length, _HAYSTACK))
    with quiet as (manager, loaded), evaluation_mode(model):
        wrapped = harness.HFLM(
            pretrained=model,
            tokenizer=own,
            backend="causal",
            batch_size=batch_size or _BATCH,
            max_length=length,
        )
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=answers,
            **{f"{what}_seed": seed for what in ("random", "numpy_random", "torch_random", "fewshot_random")},
        )
    figures = {"tasks": _figures(results), "lm_eval": results["lm_eval_version"]}
    return figures | ({"answers": _answers(results)} if answers else {})


def check_tasks(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> None:
    """Raise what `run_tasks`, which has the same arguments, raises before the model runs; the data are fetched."""
    _check(tasks, limit, batch_size, seed)
    length = context_limit(config) or _HAYSTACK
    import_lm_eval()
    with loaded_tasks(tokenizer, tasks, include_path, length, min(length, _HAYSTACK)):
        pass


def compare_tasks(original: dict[str, Any], latent: dict[str, Any]) -> dict[str, Any]:
    """Latent minus original, metric by metric, from two results of :func:`run_tasks`.

    Returns:
        {"tasks": {name: {metric: difference, metric + "_stderr": combined error or None, "samples": n}}}. The error is
        that of the differences question by question where both results have "answers". Else it is that of independent
        answers; both models saw the same questions, so the true one is usually smaller.

    Raises:
        ValueError: the two did not run the same tasks, or not on as many samples.
    """
    ran = [{name: row["samples"] for name, row in result["tasks"].items()} for result in (original, latent)]
    if ran[0] != ran[1]:
        raise ValueError(
            f"a comparison needs the same samples of the same tasks: got {ran[0]} and {ran[1]}; run both alike"
        )
    compared: dict[str, Any] = {}
    for name, row in latent["tasks"].items():
        reference = original["tasks"][name]
        compared[name] = {"samples": row["samples"]}
        for metric, value in row.items():
            if metric in _COUNTS or metric.endswith("_stderr") or None in (value, reference.get(metric)):
                continue
            errors = [figures.get(f"{metric}_stderr") for figures in (reference, row)]
            combined = None if None in errors else math.hypot(*errors)
            pairs = [result.get("answers", {}).get(name, {}).get(metric) for result in (original, latent)]
            if all(pairs):
                differences = np.subtract(pairs[1], pairs[0], dtype=float)
                combined = mean_and_error(differences)[1]
            compared[name] |= {metric: value - reference[metric], f"{metric}_stderr": combined}
    return {"tasks": compared}


def _check(tasks: Sequence[str], limit: int | None, batch_size: int | None, seed: int) -> None:
    if isinstance(tasks, str):
        raise TypeError("tasks are several names: got one string; pass [name]")
    if not tasks:
        raise ValueError(
            "--tasks names at least one task: got 0; name one, such as arc_easy, or leave it out"
        )
    check_counts(limit=(limit, 1), batch_size=(batch_size, 1), seed=(seed, 0))


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's "metric,filter" entries as plain names and finite numbers, task by task."""
    figures: dict[str, Any] = {}
    for name, row in results["results"].items():
        metrics: dict[str, Any] = {}
        if results["configs"].get(name, {}).get("output_type") == "multiple_choice":
            metrics = dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            base = metric.removesuffix("_stderr")
            if not comma or (
                base.isdigit() and row.get(f"{base},{kind}") == -1
            ):  # no haystack of that length ran
                continue
            number = isinstance(value, int | float) and math.isfinite(value)
            label = base if kind == "none" else f"{base}[{kind}]"
            metrics[label + metric[len(base) :]] = float(value) if number else None
        if metrics:
            metrics["samples"] = _samples(results, name)
            shots = results["n-shot"].get(name)
            figures[name] = metrics if shots is None else metrics | {"shots": int(shots)}
    return figures


def _answers(results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The scores of single questions, in their order, by task and metric, for the metrics that are a number a question."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, samples in results["samples"].items():
        scores: dict[str, dict[int, Any]] = {}
        for sample in samples:
            kind = sample.get("filter", "none")
            for metric in sample["metrics"]:
                label = metric if kind == "none" else f"{metric}[{kind}]"
                scores.setdefault(label, {})[sample["doc_id"]] = sample[metric]
        found[name] = {
            label: [float(rows[index]) for index in sorted(rows)]
            for label, rows in scores.items()
            if all(isinstance(score, int | float | np.number) for score in rows.values())
        }
    return found


def _samples(results: dict[str, Any], name: str) -> int:
    """Samples of a task, or of all tasks of a group."""
    if name in results["n-samples"]:
        return int(results["n-samples"][name]["effective"])
    return sum(_samples(results, child) for child in results["group_subtasks"].get(name, ()))


def _refuse(request: CheckRequest, options: Settings) -> None:
    shortest = min((model.config for model in request.models.values()), key=lambda c: context_limit(c) or 0)
    check_tasks(shortest, request.tokenizer, request.given["tasks"], **options)


def _measure(model: PreTrainedModel, request: CheckRequest, _: Step, options: Settings) -> dict[str, Any]:
    return run_tasks(model, request.tokenizer, request.given["tasks"], **options)


def _rows(latent: Figures) -> dict[str, Callable[[Figures], str]]:
    """One a task and metric that has a standard error."""

    def show(task: str, metric: str) -> Callable[[Figures], str]:
        def cell(figures: Figures) -> str:
            row = figures["tasks"]["tasks"][task]
            return with_error(row[metric], row.get(f"{metric}_stderr"))

        return cell

    return {
        f"{task}, {metric}": show(task, metric)
        for task, row in latent["tasks"]["tasks"].items()
        for metric in row
        if isinstance(row[metric], float) and f"{metric}_stderr" in row
    }


CHECK = check.Check(
    name="tasks",
    arguments=(check.BATCH_SIZE, "tasks", "include_path", "limit"),
    refuse=_refuse,
    run=check.run_each("tasks", _measure, compare_tasks),
    asked_by="tasks",
    rows=_rows,
)
