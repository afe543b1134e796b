"""Two processes train as one does, whole or sharded, and go on where both were ended."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.jobs.recipe import Scale
from kvlatent.training.resume import read_journal
from kvlatent.training.sharding import check_scale
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training
from processes_worker import KILLED_AT, SETTINGS, STEPS
from training_setup import blocks, original, recipe, run, student_of

WORKER = Path(__file__).with_name("processes_worker.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process here, two beside it."""
    root = tmp_path_factory.mktemp("processes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(root)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    teacher = original("llama-tied")
    student = student_of(teacher)
    config = recipe(*SETTINGS)
    prepare_for_training(student, config)
    for stage in (1, 2):
        train_stage(student, teacher, stage, blocks(20), config, root / "one" / f"stage{stage}")
    return root


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(runs, kind, stage):
    one, two = (read_journal(runs / name / stage / "metrics.jsonl") for name in ("one", kind))
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    for name in ("loss", "grad_norm", "learning_rate"):
        pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True)]
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs), (name, pairs)
    if stage == "stage1":
        assert one[-1]["layer_losses"] == pytest.approx(two[-1]["layer_losses"], rel=1e-5)
    assert one[0]["loss"] > 1.05 * one[-1]["loss"]
    weights = [load_file(runs / name / stage / "final.safetensors") for name in ("one", kind)]
    assert set(weights[0]) == set(weights[1])
    # Adam divides a gradient by its size, so what is rounding in a tiny one is not in the weight.
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=2e-4) for key in weights[0])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_sigterm_to_one_process_saves_in_all(runs, kind):
    found = json.loads((runs / f"{kind}.json").read_text())
    for number, sentence in enumerate(found["sentences"], 1):
        assert sentence.startswith(
            f"stage {'I' * number}: stage {number} was asked to end (SIGTERM) at step {KILLED_AT + 1}"
        )
        assert sentence.endswith("repeat the same to continue") and f"checkpoint-{KILLED_AT + 1}" in sentence
    assert len(found["sentences"]) == 2


def test_student_and_teacher_are_sharded_while_they_train_only(runs):
    ddp, fsdp2 = (json.loads((runs / f"{kind}.json").read_text()) for kind in ("ddp", "fsdp2"))
    assert ddp["seen"] == ["student whole", "teacher whole"]
    assert fsdp2["seen"] == ["student sharded", "teacher sharded"]
    assert ddp["types"] == fsdp2["types"] == ["Tensor"]


def test_a_run_of_two_processes_is_not_continued_by_one_unasked(runs, tmp_path):
    teacher = original("llama-tied")
    student = student_of(teacher)
    config = recipe(*SETTINGS)
    prepare_for_training(student, config)
    folder = runs / "ddp" / "stage1"
    with pytest.raises(ValueError, match=r"another processes \(2, now None\)"):
        run(student, teacher, 1, folder, config, blocks(20))
    (folder / "final.safetensors").unlink()
    with pytest.raises(ValueError, match=r"processes \(2, now None\).*pass --allow-change to go on"):
        run(student, teacher, 1, folder, config, blocks(20))
    summary = run(student, teacher, 1, folder, config, blocks(20), allow_change=True)
    assert (summary["steps"], summary["changes"]) == (STEPS, ["processes (2, now None)"])
    with pytest.raises(ValueError, match=r"sharding \(fsdp2, now None\)"):
        run(student, teacher, 1, runs / "fsdp2" / "stage1", config, blocks(20), allow_change=True)


def test_processes_that_do_not_divide_the_batch_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("kvlatent.training.loop.join_processes", lambda device: 3)
    teacher = original()
    student = student_of(teacher)
    prepare_for_training(student, recipe())
    with pytest.raises(
        ValueError, match=r"got stage1.batch_size=2 and 3 processes; try --set stage1.batch_size=3"
    ):
        run(student, teacher, 1, tmp_path / "run", recipe())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("scale", "is_spread", "sentence"),
    [
        ({"sharding": "fsdp2"}, False, "got one process without any; start with torchrun"),
        ({"deepspeed": "ds.json"}, True, "scale.deepspeed needs GPUs and torch sees none"),
        ({"deepspeed": "ds.json", "sharding": "fsdp2"}, True, "exclude each other"),
    ],
)
def test_scales_that_cannot_be_are_one_sentence(scale, is_spread, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_scale(Scale(**scale), "cpu", is_spread=is_spread)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"zero_optimization": {"stage": 3}}', "got stage 3 in .*ds.json; use scale.sharding=fsdp2"),
        ("{", "is no DeepSpeed configuration in JSON"),
        ("[]", "is no DeepSpeed configuration in JSON"),
        (None, "is no DeepSpeed configuration in JSON"),
    ],
)
def test_deepspeed_configurations_that_cannot_be_are_one_sentence(text, sentence, tmp_path, monkeypatch):
    scale = Scale(deepspeed=str(tmp_path / "ds.json"))
    with pytest.raises(ValueError, match="needs DeepSpeed, which is not installed; pip install deepspeed"):
        check_scale(scale, "cuda", is_spread=True)
    monkeypatch.setattr("kvlatent.training.sharding.find_spec", lambda name: True)
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        check_scale(scale, "cuda", is_spread=True)
    assert "\n" not in str(caught.value)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    check_scale(scale, "cuda", is_spread=True)
