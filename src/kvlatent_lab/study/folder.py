"""The folder of a study: one JSON file a cell, written whole, claimed by one process at a time.

What the results are of stands in `study.json`; a call with other settings is refused. `work/` holds what is made on the
way (tokens, statistics, conversions, unfinished training) and can be deleted when nothing runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvlatent.jobs.apart import Inputs
from kvlatent.jobs.atomic import prepare_output, read_json
from kvlatent.jobs.fingerprints import differences
from kvlatent.jobs.record import complaint
from kvlatent.jobs.work_directory import WorkDirectory
from kvlatent_lab.study.study_cell import StudyCell

__all__ = ["ABOUT", "StudyFolder", "cell_files", "read_cell"]

ABOUT = "study.json"
_AGAIN = "delete it to measure it again"


class StudyFolder(WorkDirectory):
    """Results and work files of one study; its steps are cells.

    Args:
        out: the directory; made by `join`.
        study: name of the study.
        decides: JSON-able mapping of everything that decides the figures of all cells.
        inputs: what is read, see `check_apart`.

    Raises:
        FileExistsError: `out` is a file, the root, the working directory or a folder around that.
        ValueError: its parent may not be written to, or it is, holds or lies in one of the inputs.
    """

    plan_name = ABOUT
    content = "a study"
    anew = elsewhere = "give another --out"

    def __init__(
        self, out: str | Path, study: str, decides: Mapping[str, Any], inputs: Inputs | None = None
    ) -> None:
        super().__init__(prepare_output(out, overwrite=True, inputs=inputs), {**decides, "study": study})
        self.work = self.path / "work"

    def join(self) -> bool:
        """As `open`, of processes that may do so at the same time."""
        if not self.is_ours():
            self.check_strangers()
        self.work.mkdir(parents=True, exist_ok=True)
        with self.lock("folder"):
            return self.open()

    def document(self) -> dict[str, Any]:
        """What `study.json` says."""
        decides = {name: value for name, value in self.plan.items() if name != "study"}
        return {"kind": "study-folder", "study": self.plan["study"], "decides": decides}

    def stored_plan(self) -> dict[str, Any]:
        """The plan in `study.json`."""
        found = super().stored_plan()
        return {**found["decides"], "study": found["study"]}

    def abandon(self) -> None:
        """Take back what `join` made, unless there is a result or another process is at a cell: for a study that cannot begin."""
        with self.lock("folder"):
            if cell_files(self.path) or any(map(self._is_claimed, (self.work / "claims").glob("*.lock"))):
                return
            self.plan_file.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # something else is in it
            self.path.rmdir()

    def _is_claimed(self, path: Path) -> bool:
        with self.claim(path.stem) as free:
            return not free

    def shared_file(self, name: str, write: Callable[[Path], Any]) -> Path:
        """A work file, written by the first process that asks for it while the others wait; `write` makes it whole or not."""
        path = self.work / name
        with self.lock(path.stem):
            if not path.is_file():
                write(path)
        return path

    def step_file(self, step: str) -> Path:
        """Where the result of a cell is."""
        return self.path / f"{step}.json"

    def result(self, cell: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The document of a finished cell, or None.

        Raises:
            ValueError: the file is damaged, or is of other settings.
        """
        file = self.step_file(cell)
        if not file.is_file():
            return None
        document = read_cell(file)
        changed = differences(document["settings"], json.loads(json.dumps(settings)))
        if changed:
            raise ValueError(f"{file} is of another {', '.join(changed)}")
        return document


def cell_files(folder: str | Path) -> list[Path]:
    """The result files of a study's folder, by name."""
    return sorted(path for path in Path(folder).glob("*.json") if path.name != ABOUT)


def read_cell(path: Path) -> dict[str, Any]:
    """The document of one cell.

    Raises:
        ValueError: it is not JSON, not the document of that cell, or a figure is not a number.
    """
    document = read_json(path, _AGAIN)
    if not isinstance(document, dict) or document.get("kind") != "study" or document.get("cell") != path.stem:
        raise ValueError(f"{path} is not the result of a cell of that name; delete it or move it away")
    try:
        return StudyCell.checked(document)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {complaint(error)}; {_AGAIN}") from error
