"""Question sets in local files as tasks of lm-eval: multiple choice, and the last word of a text (LAMBADA).

A line holds `query`, `choices` and the `label` of the right one, or a `text` whose last word is to be predicted. They
are written anew with the blanks that lm-eval puts between question and answer itself, so that acc_norm counts the
characters of the answer alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from kvlatent.jobs.atomic import write_text

__all__ = ["SETS", "available_sets", "write_tasks"]

SETS = {
    "lambada": "lambada.jsonl",
    "hellaswag": "hellaswag.jsonl",
    "piqa": "piqa_valid.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "openbookqa": "openbookqa_test.jsonl",
}
"""Files by the name of the set."""


def available_sets(folder: Path) -> list[str]:
    """Names of the sets whose file is in the folder."""
    return [name for name, file in SETS.items() if (folder / file).is_file()]


def write_tasks(folder: Path, out: Path, limit: int) -> list[str]:
    """Write tasks of the first `limit` questions of every set that is there; returns the names of the sets.

    The task of a set is called `local_` and its name.

    Raises:
        ValueError: a line is neither a question with choices nor a text of two words or more.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = available_sets(folder)
    for name in names:
        lines = (folder / SETS[name]).read_text(encoding="utf-8").splitlines()[:limit]
        rows = [_row(json.loads(line), f"{SETS[name]}, line {at}") for at, line in enumerate(lines, 1)]
        data = out / f"{name}.jsonl"
        write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
        task = _task(name, data, "choices" in rows[0])
        write_text(out / f"local_{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    return names


def _row(found: dict[str, Any], place: str) -> dict[str, Any]:
    if {"query", "choices", "label"} <= found.keys():
        choices = [choice.strip() for choice in found["choices"]]
        return {"query": found["query"].rstrip(), "choices": choices, "label": found["label"]}
    before, blank, last = str(found.get("text", "")).strip().rpartition(" ")
    if not blank:
        raise ValueError(
            f"a question has query, choices and label, or a text of two words or more: got {sorted(found)} in {place}; "
            "correct the file"
        )
    return {"query": before, "answer": last}


def _task(name: str, data: Path, chooses: bool) -> dict[str, Any]:
    """lm-eval's YAML of a set."""
    metrics = ("acc", "acc_norm") if chooses else ("acc",)
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.absolute())},
            "cache_dir": str(data.absolute().with_name("cache")),
        },
        "test_split": "test",
        "output_type": "multiple_choice" if chooses else "loglikelihood",
        "doc_to_text": "query",
        **(
            {"doc_to_choice": "choices", "doc_to_target": "label"} if chooses else {"doc_to_target": "answer"}
        ),
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": 1.0},
    }
