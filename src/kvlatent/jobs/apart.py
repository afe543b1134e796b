"""That an output is apart from what it is made from: it neither is an input, nor holds one, nor lies in one.

An output replaces what stands in its place, so an input there would be destroyed by the command that reads it. Paths are
compared as the file system sees them, since one place has many spellings: relative, `..`, links, bind mounts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

__all__ = ["Inputs", "check_apart"]

Inputs = Mapping[str, Any]
"""What an output is made from, by what users call it: paths, hub ids, None or what is no path at all."""

_MOST_LINKS = 40  # of one path, as in the kernel


def check_apart(out: str | os.PathLike[str], inputs: Inputs) -> None:
    """Raise `ValueError` where `out` is, holds or lies in one of the inputs; a name that is no local path cannot be hit.

    Args:
        out: that will be written, replaced or removed; it need not exist.
        inputs: a directory also stands for what its links lead to, a hub id for its folder in the cache of the hub.
    """
    target = Path(os.path.realpath(out))
    for name, source in inputs.items():
        if source is None or not isinstance(source, str | os.PathLike):
            continue
        relation = _relation(target, source)
        if relation is not None:
            raise ValueError(
                f"an output must be apart from what it is made from: {out} {relation} the {name} {source}; give the "
                "output a place of its own"
            )


def _relation(target: Path, source: str | os.PathLike[str]) -> str | None:
    """What the output (a resolved path) is to an input, as a verb, or None where they are apart."""
    places = list(_places(source))
    for folder in target, *target.parents:
        if any(_same(folder, place) for place in places):
            return "is" if folder == target else "lies in"
    if any(_same(folder, target) for place in places for folder in place.parents):
        return "holds"
    return None


def _places(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Where the bytes of an input are, and the links on the way to them, without which it cannot be found."""
    path = Path(source)
    if not path.exists():
        yield from _cached(str(source))
        return
    yield from _steps(path)
    if path.is_dir():  # as a checkpoint that is a folder of links, such as a snapshot in the cache of the hub
        for entry in path.iterdir():
            if entry.is_symlink():
                yield from _steps(entry)


def _steps(path: Path) -> Iterator[Path]:
    """A path and every link that it leads through, each with its own folder resolved, and what is at the end."""
    for _ in range(_MOST_LINKS):
        place = Path(os.path.realpath(path.parent), path.name)
        if not place.is_symlink():
            break
        yield place
        path = place.parent / place.readlink()
    yield Path(os.path.realpath(path))


def _cached(name: str) -> Iterator[Path]:
    """Folders in the cache of the hub that hold a model or data set of that name (`name:config:split` for the latter)."""
    for kind in ("model", "dataset"):
        try:
            folder = repo_folder_name(repo_id=name.partition(":")[0], repo_type=kind)
        except HFValidationError:  # a path, of nothing
            return
        if os.path.isdir(cached := os.path.join(constants.HF_HUB_CACHE, folder)):
            yield Path(os.path.realpath(cached))


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file or directory, under any name."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return False
