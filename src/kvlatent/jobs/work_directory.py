"""A directory in which long work survives a kill: what it is of, and which steps are finished.

The plan file holds everything that decides the result. A step counts as finished when its JSON file is there; all files
are written beside their place, synced and put there by a rename, so a kill at any moment leaves a finished step or none.
A second call with the same plan continues; one with another is refused, and told what differs. `compress` and `train`
have one beside their output (`OUT.partial`), each stage of training one in there, and a study the folder of its results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlatent.jobs.apart import Inputs, check_apart
from kvlatent.jobs.atomic import prepare_output, read_json, write_text
from kvlatent.jobs.fingerprints import differences

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["WorkDirectory", "partial_of", "prepare_place"]


def prepare_place(out: str | Path, overwrite: bool, inputs: Inputs) -> Path:
    """As `prepare_output`, of an output whose unfinished work stands beside it, which is replaced and removed, too."""
    place = prepare_output(out, overwrite, inputs)
    check_apart(partial_of(place), inputs)
    return place


def partial_of(out: str | Path) -> Path:
    """Where the unfinished work of an output is kept."""
    out = Path(out).absolute()
    return out.with_name(out.name + ".partial")


class WorkDirectory:
    """Files of work that may be unfinished.

    Args:
        path: the directory; made by `open`.
        plan: JSON-able mapping of everything that decides the result.
    """

    plan_name = "plan.json"
    content = "an unfinished run"
    anew = "pass --overwrite to start anew"
    elsewhere = "move it, give another --out, or pass --overwrite to delete it"

    def __init__(self, path: str | Path, plan: Mapping[str, Any]) -> None:
        self.path = Path(path).absolute()
        self.work = self.path  # where locks are
        self.plan_file = self.path / self.plan_name
        self.plan = json.loads(json.dumps(plan))

    def open(self, *, overwrite: bool = False, allow_change: bool = False) -> bool:
        """Make the directory, or continue in it; returns whether it was made.

        Args:
            overwrite: begin anew where it cannot be continued.
            allow_change: continue with another plan where only what `may_change` differs.

        Raises:
            FileExistsError: it is a file, or holds what is none of ours and `overwrite` is false.
            ValueError: it holds the work of another plan, or of a damaged one, and `overwrite` is false.
        """
        if not self.is_ours():
            self.check_strangers(overwrite)
        elif (refusal := self._refusal(allow_change)) is None:
            if allow_change and (changed := differences(self.stored_plan(), self.plan)):
                self._note_changes(changed)
                write_text(self.plan_file, json.dumps(self.document(), indent=2) + "\n")
            return False
        elif not overwrite:
            raise ValueError(refusal)
        if overwrite and self.path.exists():
            self.remove()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.plan_file, json.dumps(self.document(), indent=2) + "\n")
        return True

    def is_ours(self) -> bool:
        """Whether the directory is there and a call made it."""
        return self.plan_file.is_file()

    def check_strangers(self, overwrite: bool = False) -> None:
        """Raise `FileExistsError` where there is a file, or more than a plan whose writing was cut short or is under way."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file, and {self.content} is kept there; move it or give another --out"
            )
        files = sorted(self.path.iterdir()) if self.path.exists() else []
        ours = (self.plan_file, self.work)
        half = f".{self.plan_name}.tmp-"
        strangers = [file.name for file in files if file not in ours and not file.name.startswith(half)]
        if strangers and not overwrite:
            what = self.content.partition(" ")[2]
            raise FileExistsError(
                f"{self.path} already holds something that is no {what} ({strangers[0]}); {self.elsewhere}"
            )

    def document(self) -> dict[str, Any]:
        """What the plan file says."""
        return self.plan

    def stored_plan(self) -> dict[str, Any]:
        """The plan that the directory was made for.

        Raises:
            ValueError: the file is damaged.
        """
        return read_json(self.plan_file, self.anew)

    def may_change(self, key: str) -> bool:
        """Whether unfinished work can go on with another value of a key of the plan."""
        return False

    def _note_changes(self, changed: list[str]) -> None:
        """Keep what is changed on the way, before it is."""

    def _refusal(self, allow_change: bool) -> str | None:
        """Why the work there is not that of this plan, or None."""
        try:
            changed = differences(self.stored_plan(), self.plan)
        except (ValueError, TypeError, KeyError, AttributeError):
            return (
                f"{self.plan_file} is damaged, so {self.content} beside it cannot be continued; {self.anew}"
            )
        fixed = [one for one in changed if not self.may_change(one.partition(" (")[0])]
        if not changed or (allow_change and not fixed):
            return None
        if allow_change:
            return (
                f"{self.path} holds {self.content} with another {', '.join(fixed)}, which --allow-change cannot change in "
                f"the middle; call it with the same to continue, or {self.anew}"
            )
        change = "" if fixed else "pass --allow-change to go on with the new values, "
        return (
            f"{self.path} holds {self.content} with another {', '.join(changed)}; call it with the same arguments to "
            f"continue, {change}or {self.anew}"
        )

    def step_file(self, step: str) -> Path:
        """What is there once a step is finished."""
        return self.path / f"step-{step}.json"

    def done(self, step: str) -> dict[str, Any] | None:
        """What a finished step left, or None."""
        file = self.step_file(step)
        return read_json(file, "delete it to repeat that step") if file.is_file() else None

    def finish(self, step: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Mark a step as finished and return its figures."""
        write_text(self.step_file(step), json.dumps(figures, indent=2) + "\n")
        return dict(figures)

    def has_work(self) -> bool:
        """Whether anything here is worth continuing: a finished step or a training checkpoint."""
        return any(self.path.glob("step-*.json")) or any(
            self.path.glob("stage*/checkpoint-*/trainer_state.json")
        )

    def lock(self, name: str) -> FileLock:
        """A lock between processes, not yet held; `with` waits for it. It goes when its process goes, however that ends."""
        from filelock import FileLock

        return FileLock(self.work / f"{name}.lock")

    @contextmanager
    def claim(self, step: str) -> Generator[bool]:
        """Hold a step while it is worked on; yields whether this process has it (else another one does)."""
        from filelock import Timeout

        (self.work / "claims").mkdir(exist_ok=True)
        lock = self.lock(f"claims/{step}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def remove(self) -> None:
        """Delete the directory, its plan last, so that a kill on the way leaves a directory known as ours."""
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self.plan_file:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
