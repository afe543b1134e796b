"""The directory beside the output where an unfinished `compress` keeps what it has.

`OUT.partial/plan.json` holds everything that decides the result. A step counts as finished when its JSON file is
there; that file is written last, synced and put in place by a rename, so a kill at any moment leaves either the
finished step or none. A second call with the same plan continues; one with another plan is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlatent.jobs.apart import Inputs, check_apart
from kvlatent.jobs.atomic import prepare_output, write_text
from kvlatent.jobs.fingerprints import differences

__all__ = ["Workspace", "prepare_place"]


def prepare_place(out: str | Path, overwrite: bool, inputs: Inputs) -> Path:
    """As `prepare_output`, of an output whose unfinished work stands beside it, which is replaced and removed, too."""
    place = prepare_output(out, overwrite, inputs)
    check_apart(_beside(place), inputs)
    return place


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


class Workspace:
    """Files of one unfinished run.

    Args:
        out: the output directory the run works for; the workspace is its sibling `out.partial`.
        plan: JSON-able mapping of everything that decides the result.
    """

    def __init__(self, out: str | Path, plan: Mapping[str, Any]) -> None:
        self.path = _beside(Path(out).absolute())
        self.plan_file = self.path / "plan.json"
        self.plan = json.loads(json.dumps(plan))

    def open(self, *, overwrite: bool = False) -> bool:
        """Make the directory, or continue in it; True when it held finished work of the same plan.

        Raises:
            FileExistsError: it is a file, or holds what is none of ours and `overwrite` is false.
            ValueError: it holds the work of another plan, or of a damaged one, and `overwrite` is false.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file, and unfinished work is kept there; move it or give another --out"
            )
        if self.is_ours() and self._continues(overwrite):
            return any(self.path.glob("step-*.json"))
        if self.path.exists():
            if not self.is_ours() and not overwrite:
                self._check_no_stranger()
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_text(self.plan_file, json.dumps(self.plan, indent=2))
        return False

    def is_ours(self) -> bool:
        """Whether the directory is there and a run made it."""
        return self.plan_file.is_file()

    def _continues(self, overwrite: bool) -> bool:
        """Whether the plan on disk is this one; another, or a damaged one, is refused unless `overwrite`."""
        try:
            changed = differences(json.loads(self.plan_file.read_text(encoding="utf-8")), self.plan)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if overwrite:
                return False
            raise ValueError(
                f"{self.plan_file} is damaged, so the unfinished run beside it cannot be continued; pass --overwrite "
                "to start anew"
            ) from error
        if changed and not overwrite:
            raise ValueError(
                f"{self.path} holds an unfinished run with another {', '.join(changed)}; call it with the same "
                "arguments to continue, or pass --overwrite to start anew"
            )
        return not changed

    def _check_no_stranger(self) -> None:
        """Raise `FileExistsError` where the directory holds more than a plan whose writing was cut short."""
        strangers = sorted(
            file.name for file in self.path.iterdir() if not file.name.startswith(".plan.json.tmp-")
        )
        if strangers:
            raise FileExistsError(
                f"{self.path} already holds something that is no unfinished run ({strangers[0]}); move it, give "
                "another --out, or pass --overwrite to delete it"
            )

    def done(self, step: str) -> dict[str, Any] | None:
        """What a finished step left, or None."""
        file = self.path / f"step-{step}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, step: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Mark a step as finished and return its figures."""
        write_text(self.path / f"step-{step}.json", json.dumps(figures, indent=2))
        return dict(figures)

    def has_work(self) -> bool:
        """Whether anything here is worth continuing: a finished step or a training checkpoint."""
        return any(self.path.glob("step-*.json")) or any(
            self.path.glob("stage*/checkpoint-*/trainer_state.json")
        )

    def remove(self) -> None:
        """Delete the directory, its plan last, so that a kill on the way leaves a directory known as ours."""
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self.plan_file:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
