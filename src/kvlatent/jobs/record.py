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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = [
    "Provenance",
    "Result",
    "TextRead",
    "command_line",
    "complaint",
    "environment",
    "joined_metrics",
    "name_for_record",
    "with_error",
]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:/\\]*){0,2}")
_PACKAGES = (
    "kvlatent",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "gguf",
    "numpy",
)


class Result(BaseModel):
    """Base of what commands write as JSON: numbers are finite, and fields of a later version are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @classmethod
    def checked(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The same document, known to be one that every reader of this class understands.

        Raises:
            pydantic.ValidationError: it is not, which is a fault of the writer.
        """
        cls.model_validate(document)
        return document


def complaint(error: ValidationError) -> str:
    """The first complaint of pydantic in one line: where, what the rule is, what was given."""
    first = error.errors()[0]
    place, own = ".".join(map(str, first["loc"])), first.get("ctx", {}).get("error")
    given = f": got {first['input']!r:.40}" if isinstance(first["input"], (str, int, float)) else ""
    said = str(own) if isinstance(own, Exception) else first["msg"] + given
    return f"{place}: {said}" if place else said


class TextRead(Result):
    """A text that was read: its last name, and its SHA-256 where it is a file."""

    name: str | None = None
    sha256: str | None = None


class Provenance(Result):
    """How a figure came about: what `environment` says, command, seed and seconds; or why there is no figure."""

    command: str | None = None
    seed: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    failed: str | None = None
    text: TextRead | None = None
    extent: dict[str, Any] | None = None
    cache_dtype: str | None = None
    tools: dict[str, str] | None = None
    python: str | None = None
    versions: dict[str, str | None] = Field(default_factory=dict)
    machine: dict[str, str | int | float | None] = Field(default_factory=dict)


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


def name_for_record(source: str | Path) -> str:
    """How a record names a source: a model or data set of the hub (`owner/name:config:split`) whole, a path by its end.

    What is neither there nor could be on the hub is taken for a path.
    """
    path, words = Path(source), str(source)
    if path.exists() or not _HUB_NAME.fullmatch(words):
        return Path(os.path.abspath(path)).name
    return words


def command_line(name: str, positional: str | Path, options: dict[str, Any]) -> str:
    """A command that repeats the run, quoted for the shell, with every path cut to its last name.

    The positional is a source (see `name_for_record`); so are options where the caller says so, by giving that name.

    Options that are None, false or empty are left out; a list repeats its flag.
    """
    words = ["kvlatent", name, name_for_record(positional)]
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


def joined_metrics(files: Iterable[tuple[str, Path]]) -> str:
    """One JSONL text from the metrics files of several stages, each line marked with its stage."""
    lines = []
    for stage, path in files:
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                lines.append(json.dumps({"stage": stage, **json.loads(line)}))
    return "".join(line + "\n" for line in lines)


def with_error(value: float, error: float | None, digits: int = 3) -> str:
    """A figure, and its standard error if there is one (a single block has none)."""
    return f"{value:z.{digits}f}" if error is None else f"{value:z.{digits}f} ± {error:.{digits}f}"
