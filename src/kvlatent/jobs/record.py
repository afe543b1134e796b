"""How a run happened, as it is written beside the weights: versions, machine, command, figures.

Nothing here names a path of the machine: local models and data are given by their last name and SHA-256, those of the
hub by their whole name.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kvlatent.jobs.atomic import read_json

__all__ = ["command_line", "environment", "joined_metrics", "read_record", "spoken_name"]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:/\\]*){0,2}")
_PACKAGES = ("kvlatent", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def environment(device: str) -> dict[str, Any]:
    """Versions of what decides the numbers, and the machine as far as it matters (cores, threads, processor)."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name from the Linux kernel, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spoken_name(source: str | Path) -> str:
    """How a record names a source: a model or data set of the hub (`owner/name:config:split`) whole, a path by its end.

    What is neither there nor could be on the hub is taken for a path.
    """
    path, words = Path(source), str(source)
    if path.exists() or not _HUB_NAME.fullmatch(words):
        return Path(os.path.abspath(path)).name
    return words


def command_line(name: str, positional: str | Path, options: dict[str, Any]) -> str:
    """A command that repeats the run, quoted for the shell, with every path cut to its last name.

    The positional is a source (see `spoken_name`); so are options where the caller says so, by giving that name.

    Options that are None, false or empty are left out; a list repeats its flag.
    """
    words = ["kvlatent", name, spoken_name(positional)]
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, Path):
            value = value.name
        if value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)) and key == "set":
            words += [word for one in value for word in (flag, str(one))]
        elif isinstance(value, (list, tuple)):
            words += [flag, ",".join(map(str, value))]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)


def read_record(path: Path) -> dict[str, Any] | None:
    """What a run wrote as run.json, or None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    record = read_json(path, "remove it or restore it")
    if not isinstance(record, dict):
        raise ValueError(  # noqa: TRY004 - the command line shows ValueError as one sentence
            f"{path} is not the record of a run: it holds a {type(record).__name__}; remove it or restore it"
        )
    return record


def joined_metrics(files: Iterable[tuple[str, Path]]) -> str:
    """One JSONL text from the metrics files of several stages, each line marked with its stage."""
    lines = []
    for stage, path in files:
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                lines.append(json.dumps({"stage": stage, **json.loads(line)}))
    return "".join(line + "\n" for line in lines)
