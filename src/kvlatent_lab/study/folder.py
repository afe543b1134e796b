"""The folder of a study: one JSON file a cell, written whole, claimed by one process at a time.

A claim is a lock that the operating system holds for the process (`filelock`), so it goes when the process goes, however
it ends. What the results are of stands in `study.json`; a call with other settings is refused. `work/` holds what
is made on the way (tokens, statistics, conversions, unfinished training) and can be deleted when nothing runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from kvlatent.jobs.apart import Inputs
from kvlatent.jobs.atomic import prepare_output, write_text
from kvlatent.jobs.fingerprints import differences
from kvlatent.jobs.record import complaint
from kvlatent_lab.study.study_cell import StudyCell

__all__ = ["ABOUT", "Folder", "cell_files", "read_cell"]

ABOUT = "study.json"
_WORK = "work"


class Folder:
    """Results and work files of one study.

    Args:
        out: the directory; made by `open`.
        study: name of the study.
        decides: JSON-able mapping of everything that decides the figures of all cells.
        inputs: what is read, see `check_apart`.

    Raises:
        FileExistsError: `out` is a file, the root, the working directory or a folder around that.
        ValueError: its parent may not be written to, or it is, holds or lies in one of the inputs.
    """

    def __init__(
        self, out: str | Path, study: str, decides: Mapping[str, Any], inputs: Inputs | None = None
    ) -> None:
        self.out = prepare_output(out, overwrite=True, inputs=inputs)
        self.work = self.out / _WORK
        self.study = study
        self.decides = json.loads(json.dumps(decides))

    def open(self) -> bool:
        """Make the directory, or go on in it; returns whether it was made.

        Raises:
            FileExistsError: it holds what is no study.
            ValueError: it holds another study, or the same of other settings; the sentence says what differs.
        """
        if not (self.out / ABOUT).is_file() and self.out.is_dir():
            ours = (_WORK, f".{ABOUT}.tmp-")  # the latter while another process makes the folder
            strangers = sorted(path.name for path in self.out.iterdir() if not path.name.startswith(ours))
            if strangers:
                raise FileExistsError(
                    f"{self.out} already holds something that is no study ({strangers[0]}); give another --out"
                )
        self.work.mkdir(parents=True, exist_ok=True)
        with self.lock("folder"):
            made = not (self.out / ABOUT).is_file()
            if made:
                about = {"kind": "study-folder", "study": self.study, "decides": self.decides}
                write_text(self.out / ABOUT, json.dumps(about, indent=2) + "\n")
        self._compare()
        return made

    def abandon(self) -> None:
        """Take back what `open` made, unless there is a result or another process is at a cell: for a study that cannot begin."""
        with self.lock("folder"):
            if cell_files(self.out) or any(map(self._is_claimed, (self.work / "claims").glob("*.lock"))):
                return
            (self.out / ABOUT).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # something else is in it
            self.out.rmdir()

    def _is_claimed(self, path: Path) -> bool:
        with self.claim(path.stem) as free:
            return not free

    def _compare(self) -> None:
        try:
            found = json.loads((self.out / ABOUT).read_text(encoding="utf-8"))
            changed = differences(
                {"study": found["study"], **found["decides"]}, {"study": self.study, **self.decides}
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.out / ABOUT} is damaged, so nobody knows what the results beside it are of; give another "
                "--out, or restore that file"
            ) from error
        if changed:
            raise ValueError(
                f"{self.out} holds a study with another {', '.join(changed)}; call it with the same arguments to "
                "continue, or give another --out"
            )

    def lock(self, name: str) -> FileLock:
        """A lock under a name, not yet held; `with` waits for it."""
        return FileLock(self.work / f"{name}.lock")

    @contextmanager
    def claim(self, cell: str) -> Generator[bool]:
        """Hold a cell while it is measured; yields whether this process has it (else another one does)."""
        (self.work / "claims").mkdir(exist_ok=True)
        lock = self.lock(f"claims/{cell}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def file(self, cell: str) -> Path:
        """Where the result of a cell is."""
        return self.out / f"{cell}.json"

    def result(self, cell: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The document of a finished cell, or None.

        Raises:
            ValueError: the file is damaged, or is of other settings.
        """
        if not self.file(cell).is_file():
            return None
        document = read_cell(self.file(cell))
        changed = differences(document["settings"], json.loads(json.dumps(settings)))
        if changed:
            raise ValueError(f"{self.file(cell)} is of another {', '.join(changed)}")
        return document

    def finish(self, document: dict[str, Any]) -> None:
        """Write the result of a cell, whole or not at all."""
        write_text(
            self.file(document["cell"]),
            json.dumps(StudyCell.checked(document), indent=1, allow_nan=False) + "\n",
        )


def cell_files(folder: str | Path) -> list[Path]:
    """The result files of a study's folder, by name."""
    return sorted(path for path in Path(folder).glob("*.json") if path.name != ABOUT)


def read_cell(path: Path) -> dict[str, Any]:
    """The document of one cell.

    Raises:
        ValueError: it is not JSON, not the document of that cell, or a figure is not a number.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, not JSON ({error}); delete it to measure it again") from error
    if not isinstance(document, dict) or document.get("kind") != "study" or document.get("cell") != path.stem:
        raise ValueError(f"{path} is not the result of a cell of that name; delete it or move it away")
    try:
        return StudyCell.checked(document)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {complaint(error)}; delete it to measure it again") from error
