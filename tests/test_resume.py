"""A run that was killed, anywhere, ends with the same weights as one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.jobs.atomic import write_atomically
from kvlatent.training.resume import (
    last_complete_checkpoint,
    load_trainable,
    missing_from,
    read_journal,
    trim_journal,
)

WORKER = Path(__file__).with_name("resume_worker.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(WORKER), str(root)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


def report(runs, name):
    return json.loads((runs / "report.json").read_text())[name]


@pytest.mark.parametrize("name", ["training", "writing"])
def test_killed_run_ends_with_the_same_weights(runs, name):
    attempts = report(runs, name)
    assert [attempt["code"] for attempt in attempts] == [-9] * (len(attempts) - 1) + [0]
    whole, resumed = (json.loads((runs / n / "hashes.json").read_text()) for n in ("uninterrupted", name))
    assert len(whole) == 3 * (4 + 6)
    assert resumed == whole
    assert not [file for file in attempts[-1]["files"] if ".tmp-" in file]
    for stage in ("stage1", "stage2"):  # two processes read back what each other's files hold
        one, other = (load_file(runs / n / stage / "final.safetensors") for n in ("uninterrupted", name))
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert len(list((runs / name / stage).glob("checkpoint-*"))) == 2


def test_kills_hit_what_they_aim_at(runs):
    """Each row: what the attempt left. The next attempt moves a broken checkpoint aside."""
    writing = {attempt["what"]: set(attempt["files"]) for attempt in report(runs, "writing")}
    assert "stage1/checkpoint-3/optimizer.pt" in writing["first optimizer"]
    assert "stage1/checkpoint-3/trainer_state.json" not in writing["first optimizer"]
    assert {"stage1/broken-3", "stage1/checkpoint-3/trainer_state.json"} <= writing["random state"]
    assert "stage1/checkpoint-6/rng_state.pth" in writing["random state"]
    assert "stage1/checkpoint-6/optimizer.pt" not in writing["weights"]
    assert {"stage1/broken-6/model.safetensors", "stage1/checkpoint-6/scheduler.pt"} <= writing["schedule"]
    assert "stage1/checkpoint-6/rng_state.pth" in writing["state"]
    assert "stage1/checkpoint-6/trainer_state.json" not in writing["state"]
    assert "stage1/checkpoint-8/trainer_state.json" in writing["final of stage I"]
    assert "stage1/final.safetensors" not in writing["final of stage I"]
    assert any(file.startswith("stage1/.final.safetensors.tmp-") for file in writing["final of stage I"])
    assert "stage2/checkpoint-8/trainer_state.json" in writing["final of stage II"]
    training = {attempt["what"]: set(attempt["files"]) for attempt in report(runs, "training")}
    assert not [file for file in training["before any checkpoint"] if "checkpoint" in file]
    assert "stage1/checkpoint-6" not in training["after one"]
    assert "stage1/final.safetensors" in training["between the stages"]
    assert not [file for file in training["between the stages"] if "stage2/checkpoint" in file]


@pytest.mark.parametrize("name", ["uninterrupted", "training", "writing"])
def test_journal_has_every_step_once_and_the_same_losses(runs, name):
    for stage in ("stage1", "stage2"):
        rows = read_journal(runs / name / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 9))
        assert [row["tokens"] for row in rows] == [64 * step for step in range(1, 9)]
        whole = read_journal(runs / "uninterrupted" / stage / "metrics.jsonl")
        assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds)


def test_full_disk_is_one_sentence_and_leaves_no_checkpoint(runs):
    (attempt,) = report(runs, "full-disk")
    assert attempt["code"] == 1
    sentence = (runs / "full-disk" / "error.txt").read_text()
    assert sentence.startswith("cannot write ")
    assert "checkpoint-3: the disk is full; " in sentence
    assert "free some disk space" in sentence
    assert "\n" not in sentence
    assert {Path(file).name for file in attempt["files"]} == {
        "error.txt",
        "stage1",
        "stage.json",
        "metrics.jsonl",
    }


@pytest.fixture
def checkpoints(runs, tmp_path):
    for path in (runs / "uninterrupted" / "stage1").glob("checkpoint-*"):
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path


def test_newest_complete_checkpoint_is_chosen(checkpoints):
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-6", "checkpoint-8"}
    assert last_complete_checkpoint(checkpoints) == checkpoints / "checkpoint-8"
    assert last_complete_checkpoint(checkpoints / "nowhere") is None


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_checkpoint_is_moved_aside(checkpoints, name, damage):
    file = checkpoints / "checkpoint-8" / name
    assert missing_from(file.parent) is None
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size - 10)
    assert name in missing_from(file.parent)
    (checkpoints / "broken-8").mkdir()  # an older one of the same step gives way
    assert last_complete_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-6", "broken-8"}
    assert any((checkpoints / "broken-8").iterdir())


def test_two_processes_need_two_random_states(checkpoints):
    assert "rng_state_0.pth" in missing_from(checkpoints / "checkpoint-8", num_processes=2)


def test_tensors_of_another_model_are_refused(checkpoints):
    weights = checkpoints / "checkpoint-8" / "model.safetensors"
    module = torch.nn.Module()
    for name, tensor in load_file(weights).items():
        module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))
    with pytest.raises(ValueError, match=r"holds 30 trained tensors, the model trains 30.*first difference"):
        load_trainable(weights, module)


def test_tensors_of_another_width_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(4, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"weight of shape \(4, 8\), the model's is \(2, 8\)"):
        load_trainable(tmp_path / "a.safetensors", torch.nn.Linear(8, 2, bias=False))
    twin = torch.nn.Linear(8, 4, bias=False)
    load_trainable(tmp_path / "a.safetensors", twin)
    assert twin.weight.eq(0).all()


def test_journal_cut_by_a_kill_is_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [row["step"] for row in read_journal(path)] == [1, 2, 3]
    trim_journal(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    trim_journal(tmp_path / "absent.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write_text("old"))

    def fail(file):
        file.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
