"""Output files and directories that exist whole or not at all.

Everything is written into a temporary sibling, flushed to disk and renamed at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from kvlatent.jobs.apart import Inputs, check_apart

__all__ = [
    "atomic_directory",
    "prepare_file",
    "prepare_output",
    "put_in_place",
    "read_json",
    "write_atomically",
    "write_text",
]

_HALF = re.compile(r"\..+\.tmp-\d+")


def prepare_output(
    out: str | os.PathLike[str], overwrite: bool = False, inputs: Inputs | None = None
) -> Path:
    """Check that `out` may be written, before any work is done; returns it as an absolute path.

    Args:
        out: directory to write.
        overwrite: it may hold something, which is replaced.
        inputs: what it is made from, see `check_apart`.

    Raises:
        FileExistsError: it is a file, the root, the working directory or a folder around that, or holds something and
            `overwrite` is false.
        ValueError: its parent may not be written to, or it is, holds or lies in one of the inputs.
    """
    out = Path(os.path.abspath(out))
    if not out.name or Path.cwd().is_relative_to(out.resolve()):
        raise FileExistsError(f"{out} cannot be replaced as a whole; give the name of a new directory")
    for place in (out, *(leftover for _, leftover in _leftovers(out))):
        check_apart(place, inputs or {})
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot create {out}: {parent} is not a directory that may be written to")
    _remove_stale(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} already holds something; give another directory or --overwrite")
    return out


def prepare_file(out: str | os.PathLike[str], overwrite: bool = False, inputs: Inputs | None = None) -> Path:
    """Check that a file may be written, before any work is done; returns it as an absolute path.

    Args:
        out, overwrite, inputs: as for `prepare_output`.

    Raises:
        FileExistsError: it is there already and `overwrite` is false.
        ValueError: it is a directory, its folder is not there or may not be written to, or it is or lies in one of the
            inputs.
    """
    path = Path(os.path.abspath(out))
    check_apart(path, inputs or {})
    if path.is_dir():
        raise ValueError(f"{out} is a directory; give the name of a file to write")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another name or pass overwrite (--overwrite)")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot create {out}: {path.parent} is not a directory that may be written to")
    return path


@contextmanager
def atomic_directory(
    out: str | os.PathLike[str], *, overwrite: bool = False, inputs: Inputs | None = None
) -> Generator[Path]:
    """Yield a temporary sibling of `out`; on success flush it and rename it to `out`, on failure remove it.

    Raises:
        FileExistsError, ValueError: see `prepare_output`.
    """
    out = prepare_output(out, overwrite, inputs).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        put_in_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def put_in_place(folder: Path, out: Path) -> None:
    """Flush a finished directory and rename it to `out`, a resolved path beside it; what stood there goes, or is put back."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    for half in _half_files(folder):
        half.unlink()
    try:
        mode = folder.stat().st_mode
        for path in folder.rglob("*"):
            _let_read(path, mode)
            _flush(path)
        if out.exists():
            out.rename(old)
        folder.rename(out)
        _flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _half_files(folder: Path) -> list[Path]:
    """What processes that were killed in `write_atomically` left below a folder that nobody writes in any more."""
    return [path for path in folder.rglob(".*.tmp-*") if path.is_file() and _HALF.fullmatch(path.name)]


def _remove_stale(out: Path) -> None:
    """Remove what a killed process left beside `out`; put back the old output if it was caught between renames."""
    for kind, sibling in _leftovers(out):
        if kind == "old" and not out.exists():
            sibling.rename(out)
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _leftovers(out: Path) -> list[tuple[str, Path]]:
    """What killed processes left beside `out`: "tmp", half a new output, or "old", the output before it."""
    found = []
    for sibling in out.parent.glob(f".{escape(out.name)}.*-*"):
        kind, _, process = sibling.name.removeprefix(f".{out.name}.").partition("-")
        if kind in ("tmp", "old") and process.isdigit() and not Path(f"/proc/{process}").exists():
            found.append((kind, sibling))
    return found


def _let_read(path: Path, mode: int) -> None:
    """Let those read a file who may read what this process makes, by the mode of something that it made.

    safetensors leaves its files to their owner alone (mode 600), and a server is often another user.
    """
    if path.is_file() and not path.is_symlink():
        with suppress(OSError):  # a file system without modes
            path.chmod(path.stat().st_mode | (mode & 0o444))


def _flush(path: Path) -> None:
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary sibling, flush it to the disk, then rename it to `path`.

    After a failure neither the sibling nor a half-written `path` is left; what a killed process left goes with the next call.
    """
    for _, half in _leftovers(path):
        half.unlink(missing_ok=True)
    sibling = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        sibling.touch()
        mode = sibling.stat().st_mode
        write(sibling)
        _let_read(sibling, mode)
        with sibling.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is damaged; the sentence ends with the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, not JSON ({error}); {remedy}") from error
