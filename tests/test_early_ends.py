"""A stage that ends early says so, keeps its last good checkpoint, and goes on: SIGTERM, a loss that runs away, other rates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.training.callbacks import SPIKE_STEPS, LossSpikes, Terminated
from kvlatent.training.resume import read_journal
from kvlatent.training.trainable import prepare_for_training
from training_setup import hashes, original, recipe, run, student_of


def prepared(*overrides: str):
    teacher = original()
    student = student_of(teacher)
    config = recipe(*overrides)
    prepare_for_training(student, config)
    return teacher, student, config


alone = pytest.mark.skipif("KVLATENT_TEST_ALONE" not in os.environ, reason="runs in a process of its own")
"""A library that another test has loaded into this process may take the signal, and ends it."""


def test_sigterm_in_a_process_of_its_own():
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "sigterm and not own",
    ]
    environment = {**os.environ, "KVLATENT_TEST_ALONE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


@alone
@pytest.mark.parametrize("stage", [1, 2])
def test_sigterm_saves_and_the_same_call_goes_on_to_the_same_weights(stage, tmp_path):
    teacher, student, config = prepared("lora.dropout=0.1")
    run(student, teacher, stage, tmp_path / "whole", config)
    whole = hashes(student)
    teacher, student, config = prepared("lora.dropout=0.1")
    before = signal.getsignal(signal.SIGTERM)

    def tell(_, step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated) as ended:
        run(student, teacher, stage, tmp_path / "cut", config, progress=tell)
    assert ended.value.code == 143
    sentence = f"stage {stage} was asked to end (SIGTERM) at step 5 of 8; its state is saved in "
    assert str(ended.value) == f"{sentence}{tmp_path}/cut/checkpoint-5; repeat the same to continue"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "cut" / "final.safetensors").exists()
    teacher, student, config = prepared("lora.dropout=0.1")
    steps = []
    run(student, teacher, stage, tmp_path / "cut", config, progress=lambda _, step, *rest: steps.append(step))
    assert steps == [6, 7, 8]
    assert hashes(student) == whole


@alone
def test_sigterm_in_the_last_step_is_no_early_end(tmp_path):
    teacher, student, config = prepared()

    def tell(_, step, *rest):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(student, teacher, 1, tmp_path, config, progress=tell)["steps"] == 8


def test_a_loss_has_run_away_after_twenty_steps_above_twice_the_median_and_the_start():
    def seen(*losses, factor=2.0):
        spikes = LossSpikes(factor, list(losses))
        return spikes.row, spikes.ran_away

    calm = [3.0] + [1.0] * 30
    assert seen(*calm) == (0, False)
    assert seen(*calm, *[3.1] * (SPIKE_STEPS - 1)) == (SPIKE_STEPS - 1, False)
    assert seen(*calm, *[3.1] * SPIKE_STEPS) == (SPIKE_STEPS, True)
    assert seen(*calm, *[2.9] * 50) == (0, False)  # no worse than where it began
    assert seen(1.0, *[1.0] * 30, *[1.9] * 50) == (0, False)
    assert seen(*calm, *[9.0] * 19, 1.0, *[9.0] * 19) == (19, False)  # not in a row
    assert seen(1.0, *[9.0] * 18) == (0, False)  # too early to say
    assert seen(*calm, *[9.0] * 50, factor=0.0) == (0, False)
    assert seen(*[0.0] * 60) == (0, False)  # nothing narrow is trained at full width


def poisoned(student, at):
    """A progress that makes the model bad behind a step: weights far too large."""

    def tell(_, step, *rest):
        if step == at:
            student.get_decoder().layers[1].self_attn.o_proj.weight.data.mul_(1e4)

    return tell


def test_a_loss_that_runs_away_ends_the_stage_and_no_bad_checkpoint_replaces_a_good_one(tmp_path):
    long = ("stage1.tokens=4800", "stage1.save_steps=5", "stage1.learning_rate=1e-6")  # 75 steps
    teacher, student, config = prepared(*long)
    with pytest.raises(
        ValueError, match=r"stage 1 stopped at step 47 of 75 because the loss was above"
    ) as caught:
        run(student, teacher, 1, tmp_path, config, progress=poisoned(student, 27))
    sentence = str(caught.value)
    assert (
        "for 20 steps in a row, over 2 times its median" in sentence and "stage1.spike_factor=0" in sentence
    )
    assert f"the last good checkpoint is {tmp_path}/checkpoint-25; try a lower rate than" in sentence
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-25"]
    assert all(
        tensor.abs().max() < 1e3
        for tensor in load_file(tmp_path / "checkpoint-25/model.safetensors").values()
    )
    teacher, student, config = prepared(*long, "stage1.learning_rate=1e-7")
    with pytest.raises(ValueError, match=r"learning_rate \(1e-06, now 1e-07\).*pass --allow-change to go on"):
        run(student, teacher, 1, tmp_path, config)
    summary = run(student, teacher, 1, tmp_path, config, allow_change=True)
    assert (summary["steps"], summary["changes"]) == (75, ["settings.learning_rate (1e-06, now 1e-07)"])


def test_a_loss_that_runs_away_is_let_go_on_where_the_recipe_says_so(tmp_path):
    teacher, student, config = prepared("stage1.tokens=3200", "stage1.spike_factor=0")
    assert run(student, teacher, 1, tmp_path, config, progress=poisoned(student, 25))["steps"] == 50


def test_a_changed_rate_counts_from_the_checkpoint_on(tmp_path):
    """The rate and Adam's settings are the new ones, on the new number of tokens; what came before stays."""
    teacher, student, config = prepared()

    def stop(_, step, *rest):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, 1, tmp_path, config, progress=stop)
    old = read_journal(tmp_path / "metrics.jsonl")
    changes = (
        "stage1.learning_rate=0.005",
        "stage1.tokens=640",
        "stage1.adam_beta1=0.5",
        "stage1.save_steps=4",
    )
    teacher, student, config = prepared(*changes)
    summary = run(student, teacher, 1, tmp_path, config, allow_change=True)
    assert summary["steps"] == 10
    assert len(summary["changes"]) == 3 and not any("save_steps" in change for change in summary["changes"])
    rows = read_journal(tmp_path / "metrics.jsonl")
    assert rows[:3] == old[:3]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.005)
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 10)
    expected = []
    for _ in range(10):
        optimizer.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert [row["learning_rate"] for row in rows[3:]] == pytest.approx(expected[2:-1])
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-10"}
    state = torch.load(tmp_path / "checkpoint-10" / "optimizer.pt", weights_only=True)
    assert {group["betas"][0] for group in state["param_groups"]} == {0.5}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stage1.batch_size=4", "settings.batch_size"),
        ("stage1.gradient_accumulation=1", "settings.gradient_accumulation"),
        ("seed=1", "seed"),
        ("lora.alpha=9", "lora.alpha"),
    ],
)
def test_what_the_position_in_the_text_or_the_start_hang_on_cannot_be_changed(override, key, tmp_path):
    teacher, student, config = prepared()

    def stop(*told):
        if told[1] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, teacher, 1, tmp_path, config, progress=stop)
    stored = (tmp_path / "stage.json").read_text()
    teacher, student, config = prepared(override, "stage1.learning_rate=0.5")
    with pytest.raises(
        ValueError, match=rf"another {key} .*, which --allow-change cannot change in the middle"
    ) as caught:
        run(student, teacher, 1, tmp_path, config, allow_change=True)
    assert "learning_rate" not in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "stage.json").read_text() == stored


def test_a_finished_stage_is_not_changed(tmp_path):
    teacher, student, config = prepared()
    run(student, teacher, 1, tmp_path, config)
    teacher, student, config = prepared("stage1.learning_rate=0.5")
    with pytest.raises(ValueError, match=r"learning_rate .*cannot change in the middle"):
        run(student, teacher, 1, tmp_path, config, allow_change=True)


def test_trackers_hear_what_the_journal_says(tmp_path, monkeypatch):
    """Whatever transformers' callback of a tracker is given; here one that notes it."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    heard = []

    class Noted(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Noted)
    teacher, student, config = prepared("report_to=[trackio]")
    run(student, teacher, 1, tmp_path, config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in heard] == [row["step"] for row in rows]
    for name in ("loss", "learning_rate", "tokens_per_second", "tokens"):
        assert [logs[name] for _, logs in heard] == [row[name] for row in rows]
