"""A training process that `test_resume.py` starts, kills and starts again; one torch thread.

It imports everything once and forks one child per scenario step: each child is a process of its own that
trains both stages (or is killed on the way) and, if it gets to the end, writes the hashes of what it trained.

Usage: resume_worker.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import peft  # imported before the forks, it takes seconds
import torch

from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training, trainable_names
from training_setup import blocks, hashes, original, recipe, student_of

CONFIG = ("lora.dropout=0.1", "data.isolate=true")  # dropout: the random state must come back too


def die(*ignored: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(stage: str, step: int):
    """A progress callback that ends the process after a step."""
    return lambda now, done, *rest: die() if (now, done) == (stage, step) else None


def kill_in_save(number: int) -> None:
    """End the process in the middle of the nth torch.save (optimizer, schedule, random state of a
    checkpoint)."""
    save, calls = torch.save, []

    def half(content, path, *args, **kwargs):
        calls.append(path)
        save(content, path, *args, **kwargs)
        if len(calls) == number:
            size = os.path.getsize(path)
            os.truncate(path, size // 2)
            die()

    torch.save = half


def kill_in_weights(number: int) -> None:
    """End the process with half of the nth checkpoint's weights written."""
    from kvlatent.training import checkpointing

    save, calls = checkpointing.save_file, []

    def half(tensors, path, *args, **kwargs):
        calls.append(path)
        save(tensors, path, *args, **kwargs)
        if len(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    checkpointing.save_file = half


def kill_in_state(number: int) -> None:
    """End the process before the nth trainer_state.json is written."""
    from transformers.trainer_callback import TrainerState

    save, calls = TrainerState.save_to_json, []

    def missing(self, path):
        calls.append(path)
        die() if len(calls) == number else save(self, path)

    TrainerState.save_to_json = missing


def kill_in_final(stage: int) -> None:
    """End the process with half of a stage's final weights in the temporary file."""
    from kvlatent.training import resume as checkpoints

    save = checkpoints.save_file

    def half(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        if json.loads(metadata["summary"])["stage"] == stage:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    checkpoints.save_file = half


def full_disk() -> None:
    """No file of this process may grow beyond 20 kB: the optimizer state does not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def train_both(directory: Path, progress=None) -> dict:
    teacher = original()
    student = student_of(teacher)
    config = recipe(*CONFIG)
    prepare_for_training(student, config)
    for stage in (1, 2):
        train_stage(student, teacher, stage, blocks(), config, directory / f"stage{stage}", progress=progress)
    found = hashes(student)
    return {name: found[name] for name in trainable_names(student)}


# Every attempt goes on where the one before it was killed. Checkpoints are due at steps 3, 6 and 8 of 8.
SCENARIOS = {
    "uninterrupted": [("end", None, None)],
    "training": [
        ("before any checkpoint", None, kill_at("stage I", 2)),
        ("after one", None, kill_at("stage I", 5)),
        ("between the stages", None, kill_at("stage II", 1)),
        ("stage II", None, kill_at("stage II", 7)),
        ("end", None, None),
    ],
    "writing": [
        ("first optimizer", lambda: kill_in_save(1), None),
        ("random state", lambda: kill_in_save(6), None),
        ("weights", lambda: kill_in_weights(1), None),
        ("schedule", lambda: kill_in_save(2), None),
        ("state", lambda: kill_in_state(1), None),
        ("final of stage I", lambda: kill_in_final(1), None),
        ("final of stage II", lambda: kill_in_final(2), None),
        ("end", None, None),
    ],
    "full-disk": [("full", full_disk, None)],
}


def in_child(work) -> int:
    """Run `work` in a forked process; returns its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - whatever it was, the fork must end here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(directory: Path, before, progress) -> None:
    if before is not None:
        before()
    try:
        (directory / "hashes.json").write_text(json.dumps(train_both(directory, progress)))
    except OSError as error:
        (directory / "error.txt").write_text(str(error))
        raise


def main(root: Path) -> None:
    torch.set_num_threads(1)
    report: dict[str, list] = {}
    for name, attempts in SCENARIOS.items():
        directory = root / name
        directory.mkdir()
        for what, before, progress in attempts:
            code = in_child(lambda d=directory, b=before, p=progress: attempt(d, b, p))
            files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))
            report.setdefault(name, []).append({"what": what, "code": code, "files": files})
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    assert peft
    main(Path(sys.argv[1]))
