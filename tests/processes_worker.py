"""Two processes that `test_processes.py` starts with torchrun: both stages under DDP and FSDP2, on the CPU through gloo.

Each run is ended by a SIGTERM on its way, to one process alone, and called again with a fresh model.

Usage: processes_worker.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import peft  # before the processes part, it takes seconds
import torch
from torch.distributed.tensor import DTensor

from kvlatent.jobs.processes import is_main, join_processes
from kvlatent.training.callbacks import Terminated
from kvlatent.training.loop import StageTrainer
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training
from training_setup import blocks, hashes, original, recipe, student_of

STEPS, KILLED_AT = 50, 23
SETTINGS = [f"stage{n}.{item}" for n in (1, 2) for item in ("tokens=3200", "save_steps=20")]
KINDS = {
    "ddp": [],
    "fsdp2": [
        "scale.sharding=fsdp2",
        "stage1.activation_checkpointing=true",
        "stage2.activation_checkpointing=true",
    ],
}
SEEN: list[str] = []  # of the tensors that a step works on


def train(root: Path, stages: tuple[int, ...], overrides: list[str]) -> dict[str, object]:
    """The stages one after the other, each ended once; what came out."""
    config = recipe(*SETTINGS, *overrides)
    teacher = original("llama-tied")
    sentences = []

    def tell(name: str, done: int, *rest: object) -> None:
        if done == KILLED_AT and not any(name in one for one in sentences):
            os.kill(os.getpid(), signal.SIGTERM)

    student = student_of(teacher)
    prepare_for_training(student, config)
    start = hashes(student)
    for stage in stages:
        for attempt in (1, 2):
            try:
                train_stage(
                    student, teacher, stage, blocks(20), config, root / f"stage{stage}", progress=tell
                )
            except Terminated as ended:
                assert attempt == 1
                sentences.append(f"stage {'I' * stage}: {ended}")
                if "scale.sharding=fsdp2" in overrides:  # the caller's model has seen nothing of it
                    assert (hashes(student) == start) == (stage == stages[0])
    types = sorted({type(p.data).__name__ for p in student.parameters()})
    return {"hashes": hashes(student), "sentences": sentences, "types": types, "seen": sorted(set(SEEN))}


def watch_shards() -> None:
    """Note what the layers of student and teacher are made of between two steps (a root stays whole until its backward)."""
    step = StageTrainer.training_step

    def noted(self, *args: object) -> torch.Tensor:
        for who, module in (
            ("student", self.decoder),
            ("teacher", self.teacher and self.teacher.get_decoder()),
        ):
            sharded = module is not None and all(isinstance(p, DTensor) for p in module.layers.parameters())
            SEEN.append(f"{who} {'sharded' if sharded else 'whole'}")
        return step(self, *args)

    StageTrainer.training_step = noted


def main(root: Path) -> None:
    torch.set_num_threads(1)
    join_processes("cpu")
    watch_shards()
    for kind, overrides in KINDS.items():
        SEEN.clear()
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate leaves it there
        found = train(root / kind, (1, 2), overrides)
        if is_main():
            (root / f"{kind}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    assert peft
    main(Path(sys.argv[1]))
