"""lm-eval's tasks and yours with their data, and its output kept off the screen; what fails becomes one sentence."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvlatent.jobs.scratch import scratch_folder

__all__ = ["import_lm_eval", "loaded_tasks"]

_ANSWER = 256  # tokens of an answer where the task does not say, lm-eval's own number
_LOUD = ("lm_eval", "transformers", "datasets")
_SERIAL = "DISABLE_MULTIPROC"  # lm-eval then resamples in this process; forking one that runs torch can hang
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "bs4": "beautifulsoup4"}
"""What pip installs, where it is neither called as the module is nor by one of lm-eval's extras."""


def import_lm_eval() -> tuple[Any, Any]:
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
    with scratch_folder() as folder, _quiet():
        # Where synthetic tasks look for the tokenizer that they measure their haystacks with.
        path = tokenizer.name_or_path
        if not path or not Path(path).is_dir():
            tokenizer.save_pretrained(path := folder)
        metadata = json.dumps({"max_seq_lengths": [haystack], "tokenizer": str(path)})
        manager = _task_manager(list(names), include_path, metadata)
        yield manager, [task for name in dict.fromkeys(names) for task in _load_task(manager, name, length)]


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


def _task_manager(names: list[str], include_path: str | Path | None, metadata: str) -> Any:
    """lm-eval's, which knows all `names`, of `include_path` alone where that suffices.

    Raises:
        ValueError: no such folder, or a name that neither it nor lm-eval has.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path is a folder of YAML tasks: got {include_path}; there is none")
    readable = ""
    if include_path is None:
        manager = _lm_eval_tasks(metadata)
    else:
        manager = _read_tasks(str(include_path), False, metadata)
        readable = f", or the YAML in {include_path} (readable: {', '.join(manager.all_tasks) or 'none'})"
        if not set(names) <= set(manager.all_tasks):
            manager = _read_tasks(str(include_path), True, metadata)
    for name in (name for name in names if name not in manager.all_tasks):
        near = ", ".join(get_close_matches(name, manager.all_tasks, 3)) or "none"
        raise ValueError(f"there is no task {name!r}; names like it: {near}; correct the name{readable}")
    return manager


def _read_tasks(include_path: str | None, defaults: bool, metadata: str) -> Any:
    library: Any = import_module("lm_eval.tasks")
    return library.TaskManager(
        include_path=include_path, include_defaults=defaults, metadata=json.loads(metadata)
    )


@lru_cache(maxsize=1)
def _lm_eval_tasks(metadata: str) -> Any:
    """lm-eval's own tasks; reading the list takes half a minute, and an original and its latent model need it both."""
    return _read_tasks(None, True, metadata)


def _load_task(manager: Any, name: str, length: int) -> list[Any]:
    """The task, the group or the tasks of the tag `name`, with their data, for a model that reads `length` tokens.

    Raises:
        ValueError: a package or the data is missing, lm-eval cannot read the task, or its answers leave no room.
    """
    try:
        loaded = manager.load(name)
    except Exception as error:  # whatever a task's own code and `datasets` raise
        raise ValueError(_why_not_loaded(name, error)) from error
    for task in loaded["tasks"].values():
        answer = (task.config.generation_kwargs or {}).get("max_gen_toks", _ANSWER)
        if task.OUTPUT_TYPE == "generate_until" and answer >= length:
            raise ValueError(
                f"question and answer share the model's context: the answers of {task.config.task!r} take {answer} tokens, "
                f"max_position_embeddings={length}; take a model of longer context, or lower max_gen_toks in the task's YAML"
            )
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _why_not_loaded(name: str, error: Exception) -> str:
    """One sentence: what is missing, and the next step."""
    if isinstance(error, ImportError):
        module = _missing_module(error)
        # lm-eval says so of a file that should lie beside the YAML, which no package replaces.
        if module is None or f"Cannot import module '{module}" in str(error):
            why = ": ".join(dict.fromkeys(_line(one) for one in (error, error.__cause__) if one is not None))
            return (
                f"the task {name!r} cannot be read, an import failed: {why}; correct its YAML, or the installation of "
                "what it names"
            )
        return (
            f"the task {name!r} needs the package {module}, which is not installed; pip install "
            f"{_distribution_of(module)}"
        )
    if isinstance(error, OSError):
        return (
            f"the data of the task {name!r} cannot be fetched: {_line(error)}; check the network, or give local files "
            "in a YAML task and include_path"
        )
    return f"the task {name!r} cannot be read: {_line(error)}; correct its YAML or its data"


def _distribution_of(module: str) -> str:
    """What pip installs for a module: the extra of lm-eval that names it, else its own distribution."""
    for requirement in requires("lm_eval") or ():
        extra = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)", requirement)
        if extra and re.match(rf"{re.escape(module)}(\b|_|\d)", extra[1].replace("-", "_")):
            return f'"lm_eval[{extra[2]}]"'
    return _DISTRIBUTIONS.get(module, module)


def _missing_module(error: BaseException | None) -> str | None:
    """The top-level module that is not installed, where that is why an import failed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            module = error.name.partition(".")[0]
            if module not in sys.modules and find_spec(module) is None:
                return module
        error = error.__cause__ or error.__context__
    return None


def _line(error: BaseException) -> str:
    """The first line of what an error says that is not empty, else its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
