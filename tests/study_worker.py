"""Processes for `test_study.py` that are killed in a study, and that share one.

It imports everything once and forks a child per process. Usage: study_worker.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import peft  # imported before the forks, it takes seconds
import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.text.corpus import evaluation_blocks
from kvlatent_lab.study import study
from on_disk import write_checkpoint, write_text

SETTINGS = (
    "data.block_size=32",
    "calibration.blocks=4",
    "calibration.rows=4",
    "conversion.align=2",
    "stage1.batch_size=4",
    "stage2.batch_size=4",
)
STEP = 4 * 32
OPTIONS = {"overrides": SETTINGS, "eval_tokens": 512, "device": "cpu"}
RANKS = ["rank0-seed0", "rank4-seed0", "rank8-seed0"]


def lay_out(folder: Path, tokenizer) -> Path:
    """A tiny checkpoint, a text to train on and one to measure on."""
    write_checkpoint(folder / "model", tokenizer)
    write_text(folder / "text.txt")
    write_text(folder / "valid.txt", seed=1)
    return folder


def original_and_blocks(place: Path, eval_tokens: int):
    """The checkpoint, its tokenizer, and the blocks that a study of so many tokens measures on."""
    original = load_model(place / "model", dtype="float32").requires_grad_(False).eval()
    tokenizer = load_tokenizer(place / "model", original.config)
    blocks = evaluation_blocks(place / "valid.txt", tokenizer, **blocks_in(place))
    return original, tokenizer, blocks.select(range(eval_tokens // 32))


def blocks_in(place: Path) -> dict:
    return {"block_size": 32, "cache_dir": place / "by-hand", "vocab_size": 300}


def run(place: Path, name: str, out: str, **options) -> dict:
    """A study of the tiny checkpoint in `place`."""
    texts = {"data": place / "text.txt", "eval_data": place / "valid.txt"}
    return study(name, place / "model", out=place / out, **{**texts, **OPTIONS, **options})


def ranks(place: Path, progress=None) -> dict:
    return run(place, "lora-rank", "ranks", tokens=4 * STEP, cells=",".join(RANKS), progress=progress)


def killed(place: Path) -> None:
    """End the process in the training of the second cell."""

    def progress(step: str, done: int, total: int, note: str) -> None:
        if RANKS[1] in step and "stage II" in step and done == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    ranks(place, progress)


def sharing(place: Path, own: str, other: str) -> None:
    """Wait in the first cell until the other process is in its own first cell, then go on."""

    def progress(step: str, done: int, total: int, note: str) -> None:
        (place / own).touch()
        deadline = time.monotonic() + 300
        while not (place / other).exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    report = run(place, "widths", "shared", cells="paper-*", progress=progress)
    (place / f"{own}.json").write_text(json.dumps(report))


def fork(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - whatever it was, the fork must end here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(place: Path) -> None:
    torch.set_num_threads(1)
    report: dict = {"killed": code(fork(lambda: killed(place)))}
    results = place / "ranks"
    report["after"] = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    report["litter"] = [path.name for path in results.iterdir() if path.name.startswith(".")]
    children = [
        fork(lambda a=a, b=b: sharing(place, a, b)) for a, b in (("first", "second"), ("second", "first"))
    ]
    report["shared"] = [code(child) for child in children]
    (place / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    assert peft
    main(Path(sys.argv[1]))
