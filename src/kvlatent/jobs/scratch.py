"""Folders for files that a step needs only while it runs, of which a killed process leaves none for good."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["scratch_folder"]

_PREFIX = "kvlatent-"
_LOCK = ".lock"  # held as long as the process lives, whatever ends it


@contextmanager
def scratch_folder() -> Generator[Path]:
    """An empty folder where temporary files go (TMPDIR), taken away at the end.

    First it takes away those of processes that are gone: states between layers may be gigabytes, and a process that is
    killed cannot.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder, lock = _locked_folder()
    try:
        inside = folder / "files"
        inside.mkdir()
        yield inside
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _locked_folder() -> tuple[Path, FileLock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = FileLock(folder / _LOCK)
        with suppress(Timeout):  # nothing else: a folder that cannot be locked would be tried for ever
            lock.acquire(timeout=0)
            if (folder / _LOCK).exists():  # else another process took it for abandoned before it was locked
                return folder, lock
            lock.release()


def _remove_abandoned(place: Path) -> None:
    """Take away scratch folders of this user whose lock nobody holds any more."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError, Timeout):  # another process may take it away at the same time
            held = folder / _LOCK
            if folder.is_symlink() or not held.is_file() or folder.stat().st_uid != os.getuid():
                continue
            with FileLock(held, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
