"""A stage's directory, and its files that survive a kill: complete checkpoints, final weights, the metrics journal.

Why: a resume takes the trained tensors from the directory and everything else from the model at hand; with a changed
learning rate, text or frozen weight the result would belong to neither run, so `stage.json` says what the run is. And the Trainer writes straight into `checkpoint-N`, `trainer_state.json` last, and resumes from the highest
N whatever its state; a kill during the write would end the run for good. Here a checkpoint counts only when
every file of it is whole, broken ones are moved aside, and every file of our own appears in one rename.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvlatent.jobs.atomic import read_json, write_atomically, write_text
from kvlatent.jobs.work_directory import WorkDirectory

__all__ = [
    "JOURNAL",
    "RunDirectory",
    "StageDirectory",
    "check_names",
    "last_complete_checkpoint",
    "load_trainable",
    "missing_from",
    "read_final",
    "read_journal",
    "trim_journal",
    "write_final",
]

WEIGHTS = "model.safetensors"
JOURNAL = "metrics.jsonl"
FINAL = "final.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


# A stage goes on with other values of these from the next step on; text, batch, seed and what is trained are the run itself.
_CHANGEABLE = {
    "tokens", "learning_rate", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "activation_checkpointing", "save_steps", "keep", "log_steps", "spike_factor",
}  # fmt: skip


class RunDirectory(WorkDirectory):
    """The unfinished work of a command that trains: its recipe's stages may change as long as they are not finished."""

    def may_change(self, key: str) -> bool:
        """As there."""
        where, _, name = key.rpartition(".")
        stage = where.removeprefix("recipe.")
        if stage in ("stage1", "stage2"):
            return name in _CHANGEABLE and not (self.path / stage / FINAL).is_file()
        return key == "recipe.report_to" or where == "recipe.target"


class StageDirectory(WorkDirectory):
    """What one stage needs to go on after a kill, and once it is finished its trained tensors."""

    plan_name = "stage.json"
    content = "a stage"
    anew = elsewhere = "delete that directory"

    @property
    def journal(self) -> Path:
        """The metrics, one JSON object a logged step."""
        return self.path / JOURNAL

    @property
    def final(self) -> Path:
        """The trained tensors in fp32 of a finished stage, its summary in the header."""
        return self.path / FINAL

    def may_change(self, key: str) -> bool:
        """As there; of a finished stage nothing."""
        where, _, name = key.rpartition(".")
        free = (where == "settings" and name in _CHANGEABLE) or key == "processes"
        return free and not self.final.is_file()

    def changes(self) -> list[str]:
        """What was changed on the way, `key (old, now new)` each."""
        file = self.path / "changes.json"
        return read_json(file, self.anew) if file.is_file() else []

    def _note_changes(self, changed: list[str]) -> None:
        write_text(self.path / "changes.json", json.dumps([*self.changes(), *changed]) + "\n")


def last_complete_checkpoint(directory: str | Path, num_processes: int = 1) -> Path | None:
    """The newest complete `checkpoint-N` in a stage's directory, or None; broken ones are renamed `broken-N`.

    A broken checkpoint is kept for inspection (an older `broken-N` of the same step gives way).
    """
    found = []
    for path in Path(directory).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    for step, path in sorted(found, reverse=True):
        if missing_from(path, num_processes) is None:
            return path
        _quarantine(path, step)
    return None


def missing_from(checkpoint: Path, num_processes: int = 1) -> str | None:
    """What a checkpoint directory lacks to be complete, in words, or None.

    Complete: the state parses as JSON, the weights are as long as their header says, the optimizer, the
        schedule and one
    random state per process are whole archives.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut"
    if not _whole_safetensors(checkpoint / WEIGHTS):
        return f"{WEIGHTS} is missing or cut"
    random = (
        [f"rng_state_{rank}.pth" for rank in range(num_processes)] if num_processes > 1 else ["rng_state.pth"]
    )
    for name in (OPTIMIZER, SCHEDULER, *random):
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or cut"
    return None


def _whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says, which its reader checks."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _quarantine(checkpoint: Path, step: int) -> None:
    """Move a broken checkpoint out of the Trainer's sight (its rotation globs `checkpoint-*`)."""
    aside = checkpoint.with_name(f"broken-{step}")
    if aside.exists():
        shutil.rmtree(aside)
    with suppress(FileNotFoundError):  # another process was faster
        checkpoint.rename(aside)


def write_final(path: Path, tensors: dict[str, Tensor], summary: dict[str, Any]) -> None:
    """Write a stage's trained tensors with its summary in the header, atomically."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(cpu, file, metadata={"summary": json.dumps(summary)}))


def read_final(path: Path, module: nn.Module) -> dict[str, Any]:
    """Copy a stage's trained tensors into the module; returns the summary stored with them.

    Raises:
        ValueError: the file is damaged, or the tensors are not those that the module trains.
    """
    if not _whole_safetensors(path):
        raise ValueError(f"{path} is damaged; delete it to go on from the stage's last checkpoint")
    load_trainable(path, module)
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["summary"])


def check_names(path: Path, module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's trained parameters, which are those that a safetensors file holds.

    Raises:
        ValueError: a name differs.
    """
    own = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    if saved != set(own):
        odd = min(saved ^ set(own))
        raise ValueError(
            f"{path} holds {len(saved)} trained tensors, the model trains {len(own)} (first difference: {odd}); "
            "resume with the model and recipe it was written by, or delete its directory"
        )
    return own


def load_trainable(path: Path, module: nn.Module) -> None:
    """Copy the tensors of a safetensors file into the module's trained parameters; names and shapes must
    agree.

    Raises:
        ValueError: a name or a shape differs.
    """
    own = check_names(path, module)
    with safe_open(path, framework="pt") as file:
        for name, parameter in own.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{path} holds {name} of shape {tuple(tensor.shape)}, the model's is {tuple(parameter.shape)}; "
                    "resume with the widths and rank it was written with, or delete its directory"
                )
            parameter.data.copy_(tensor)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut by a kill is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def trim_journal(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, which a resumed run writes again."""
    if not path.is_file():
        return
    kept = "".join(json.dumps(row) + "\n" for row in read_journal(path) if row["step"] <= last_step)
    write_text(path, kept)
