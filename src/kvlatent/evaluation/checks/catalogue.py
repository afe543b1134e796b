"""Finding lm-eval's tasks and yours by name, and loading them: every way this can fail becomes one sentence."""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["find_tasks", "load_task"]

_ANSWER = 256  # tokens of an answer where the task does not say, lm-eval's own number

_EXTRAS = {
    "acpbench": ("lark", "tarski", "pddl", "kstar_planner"),
    "ifeval": ("langdetect", "immutabledict"),
    "japanese_leaderboard": ("emoji", "neologdn", "fugashi"),
    "longbench": ("fuzzywuzzy", "jieba", "rouge"),
    "math": ("antlr4", "math_verify", "sympy"),
    "multilingual": ("nagisa", "pycountry"),
    "ruler": ("nltk", "wonderwords"),
}
"""lm-eval's extras, each with the modules of it that tasks import."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "bs4": "beautifulsoup4"} | {
    module: f'"lm_eval[{extra}]"' for extra, modules in _EXTRAS.items() for module in modules
}
"""What pip installs, where it is not called as the module is."""


def find_tasks(names: list[str], include_path: str | Path | None, metadata: str) -> Any:
    """A `TaskManager` that knows all `names`, of `include_path` alone where that suffices.

    `metadata` (JSON) is handed to tasks that make up their own data.

    Raises:
        ValueError: no such folder, or a name that neither it nor lm-eval has.
    """
    local: list[str] = []
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"include_path is a folder of YAML tasks: got {include_path}; there is none")
        manager = _manager(str(include_path), False, metadata)
        local = manager.all_tasks
    if not set(names) <= set(local):
        manager = (
            _lm_eval_tasks(metadata) if include_path is None else _manager(str(include_path), True, metadata)
        )
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks, 3)) or "none"
            raise ValueError(
                f"there is no task {name!r}; names like it: {near}; correct the name"
                + (
                    f", or the YAML in {include_path} (readable: {', '.join(local) or 'none'})"
                    if include_path
                    else ""
                )
            )
    return manager


def _manager(include_path: str | None, defaults: bool, metadata: str) -> Any:
    library: Any = import_module("lm_eval.tasks")
    return library.TaskManager(
        include_path=include_path, include_defaults=defaults, metadata=json.loads(metadata)
    )


@lru_cache(maxsize=1)
def _lm_eval_tasks(metadata: str) -> Any:
    """lm-eval's own tasks; reading the list takes half a minute, and an original and its latent model need it both."""
    return _manager(None, True, metadata)


def load_task(manager: Any, name: str, length: int) -> list[Any]:
    """The task, the group or the tasks of the tag `name`, with their data, for a model that reads `length` tokens.

    Raises:
        ValueError: a package or the data is missing, lm-eval cannot read the task, or its answers leave no room.
    """
    try:
        found = manager.load(name)
    except ImportError as error:
        module = _missing(error)
        # lm-eval says so of a file that should lie beside the YAML, which no package replaces.
        if module is None or f"Cannot import module '{module}" in str(error):
            why = ": ".join(dict.fromkeys(_line(one) for one in (error, error.__cause__) if one is not None))
            raise ValueError(
                f"the task {name!r} cannot be read, an import failed: {why}; correct its YAML, or the installation of "
                "what it names"
            ) from error
        raise ValueError(
            f"the task {name!r} needs the package {module}, which is not installed; pip install "
            f"{_DISTRIBUTIONS.get(module, module)}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"the data of the task {name!r} cannot be fetched: {_line(error)}; check the network, or give local files "
            "in a YAML task and include_path"
        ) from error
    except Exception as error:  # whatever a task's own code and `datasets` raise
        raise ValueError(
            f"the task {name!r} cannot be read: {_line(error)}; correct its YAML or its data"
        ) from error
    for task in found["tasks"].values():
        answer = (task.config.generation_kwargs or {}).get("max_gen_toks", _ANSWER)
        if task.OUTPUT_TYPE == "generate_until" and answer >= length:
            raise ValueError(
                f"question and answer share max_length: the answers of {task.config.task!r} take {answer} tokens, "
                f"max_length={length}; take a model of longer context, or lower max_gen_toks in the task's YAML"
            )
    group = found.get("groups", {}).get(name)
    return list(found["tasks"].values()) if group is None else [group]


def _missing(error: BaseException | None) -> str | None:
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
