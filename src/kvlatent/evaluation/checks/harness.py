"""lm-eval as a library: its modules, its tasks with their data, and its output kept off the screen."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from kvlatent.evaluation.checks.catalogue import find_tasks, load_task

__all__ = ["lm_eval_modules", "loaded_tasks"]

_LOUD = ("lm_eval", "transformers", "datasets")
_SERIAL = "DISABLE_MULTIPROC"  # lm-eval then resamples in this process; forking one that runs torch can hang


def lm_eval_modules() -> tuple[Any, Any]:
    """The modules that run tasks and wrap models."""
    try:
        return import_module("lm_eval.evaluator"), import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ValueError(
            'tasks need lm-eval, which is not installed; pip install "kvlatent[eval]"'
        ) from error


@contextmanager
def loaded_tasks(
    tokenizer: Any, names: Sequence[str], include_path: str | Path | None, length: int, haystack: int
) -> Generator[tuple[Any, list[Any]]]:
    """lm-eval's manager and the tasks with their data, while all is quiet."""
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder, _quiet():
        metadata = {"max_seq_lengths": [haystack], "tokenizer": _tokenizer_folder(tokenizer, folder)}
        manager = find_tasks(list(names), include_path, json.dumps(metadata))
        yield manager, [task for name in dict.fromkeys(names) for task in load_task(manager, name, length)]


@contextmanager
def _quiet() -> Generator[None]:
    """Keep progress bars, log and prints off the screen; errors are raised all the same."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    serial = os.environ.get(_SERIAL)
    os.environ[_SERIAL] = "1"
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        os.environ.pop(_SERIAL) if serial is None else os.environ.update({_SERIAL: serial})


def _tokenizer_folder(tokenizer: Any, folder: str) -> str:
    """Where synthetic tasks find the tokenizer to measure their haystacks with; `folder` if nowhere else."""
    if Path(tokenizer.name_or_path).is_dir() and tokenizer.name_or_path:
        return str(tokenizer.name_or_path)
    tokenizer.save_pretrained(folder)
    return folder
