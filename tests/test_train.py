"""One stage: the mean over an accumulated batch, what it reports, and how it ends early."""

from __future__ import annotations

import hashlib
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MistralConfig

from kvlatent.jobs.recipe import Stage2
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.training.layer_loss import capture, layer_losses
from kvlatent.training.loop import collate
from kvlatent.training.placement import check_teacher
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training
from training_setup import SIZES, blocks, hashes, original, recipe, run, student_of


def oracle_step(student, teacher, stage, rows):
    """The gradient of one loss over all rows at once."""
    batch = collate(rows)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    decoder = student.get_decoder()
    if stage == 1:
        loss = layer_losses(decoder, capture(teacher.get_decoder(), inputs), inputs).mean()
    else:
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        loss = stage2_loss(
            hidden, student.get_output_embeddings(), batch["labels"], Stage2(objective="next_token")
        )
    loss.backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return loss.item(), torch.cat([grad.flatten() for grad in grads]).norm().item()


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_is_a_mean_over_the_whole_accumulated_batch(stage, tmp_path):
    """Blocks with very different numbers of labels, three micro-batches: as one big batch would have it."""
    rows = blocks(3)
    rows[0]["labels"] = torch.where(torch.arange(16) < 3, rows[0]["labels"], -100)
    rows[1]["labels"] = torch.full((16,), -100)  # a micro-batch without any label
    teacher = original()
    student = student_of(teacher)
    section = f"stage{stage}"
    config = recipe(
        f"{section}.batch_size=1", f"{section}.gradient_accumulation=3", f"{section}.tokens=48",
        "stage2.objective=next_token", f"{section}.max_grad_norm=0",
    )  # fmt: skip
    prepare_for_training(student, config)
    loss, norm = oracle_step(student, teacher, stage, rows)
    student.zero_grad()
    summary = run(student, teacher, stage, tmp_path, config, rows)
    assert summary["steps"] == 1
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert math.isclose(row["loss"], loss, rel_tol=1e-5)
    assert math.isclose(row["grad_norm"], norm, rel_tol=1e-4)
    naive = sum(oracle_step(student, teacher, stage, [r])[0] for r in (rows[0], rows[2])) / 3
    assert stage == 1 or not math.isclose(naive, loss, rel_tol=1e-2)


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    ends = []
    for flag in ("false", "true"):
        teacher = original()
        student = student_of(teacher)
        config = recipe(f"stage1.activation_checkpointing={flag}", f"stage2.activation_checkpointing={flag}")
        prepare_for_training(student, config)
        for stage in (1, 2):
            run(student, teacher, stage, tmp_path / f"{flag}{stage}", config)
        ends.append(hashes(student))
    assert ends[0] == ends[1]


def test_progress_and_journal_tell_every_step(tmp_path, capsys):
    teacher = original()
    student = student_of(teacher)
    config = recipe("stage1.log_steps=3")
    prepare_for_training(student, config)
    seen = []
    run(student, teacher, 1, tmp_path, config, progress=lambda *told: seen.append(told))
    assert [told[:3] for told in seen] == [("stage I", n, 8) for n in range(1, 9)]
    assert all(re.fullmatch(r"[\d,]+ tokens/s, loss \d+\.\d{4}", note) for *_, note in seen)
    losses = [float(note.split()[-1]) for *_, note in seen]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6, 8]
    assert [row["tokens"] for row in rows] == [64, 192, 384, 512]
    assert rows[0]["loss"] == pytest.approx(losses[0], abs=5e-5)  # the note has four decimals
    assert rows[1]["loss"] == pytest.approx((losses[1] + losses[2]) / 2, abs=5e-5)
    assert {"learning_rate", "grad_norm", "layer_losses", "seconds"} <= set(rows[0])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(stage, tmp_path):
    teacher = original()
    student = student_of(teacher)
    config = recipe()
    prepare_for_training(student, config)
    calls = []

    def poisoned(step, *args):
        calls.append(step)
        if step == 4:  # poisons step 5, after the checkpoint of step 3
            student.get_decoder().layers[1].self_attn.o_proj.weight.data[0, 0] = float("inf")

    with pytest.raises(ValueError, match=rf"stage {stage} stopped at step 5 of 8 .*checkpoint-3") as caught:
        run(student, teacher, stage, tmp_path, config, progress=lambda _, step, *rest: poisoned(step))
    assert "\n" not in str(caught.value)
    assert f"stage{stage}.learning_rate=0.01" in str(caught.value)
    assert calls == [1, 2, 3, 4]
    assert not (tmp_path / "final.safetensors").exists()
    kept = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    # and from there the run goes on to the end
    student = student_of(teacher)
    prepare_for_training(student, config)
    assert run(student, teacher, stage, tmp_path, config)["steps"] == 8


@pytest.mark.parametrize("clip", [1, 0])
def test_gradient_that_is_not_finite_stops_before_the_optimiser(clip, tmp_path):
    teacher = original()
    student = student_of(teacher)
    config = recipe(f"stage1.max_grad_norm={clip}")
    prepare_for_training(student, config)
    before = hashes(student)
    weight = student.get_decoder().layers[0].self_attn.o_proj.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(
        ValueError, match=r"at step 1 of 8 because the gradient norm is nan.*none was written"
    ):
        run(student, teacher, 1, tmp_path, config)
    assert hashes(student) == before


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoint_of_tensors_that_are_not_finite_is_not_written(stage, tmp_path):
    """The last update before a checkpoint may break what the loss before it could not show."""
    teacher = original()
    student = student_of(teacher)
    config = recipe(f"stage{stage}.max_grad_norm=0")
    prepare_for_training(student, config)

    def poison(_, step, *rest):
        if step == 6:  # where the second checkpoint is due
            student.get_decoder().layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")

    sentence = (
        rf"stage {stage} stopped at step 6 of 8 because layers.1.self_attn.o_proj.weight .*checkpoint-3;"
    )
    with pytest.raises(ValueError, match=sentence):
        run(student, teacher, stage, tmp_path, config, progress=poison)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    kept = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("num_attention_heads", 8, 4),
        ("num_key_value_heads", 4, 2),
        ("intermediate_size", 96, 48),
        ("vocab_size", 62, 61),
        ("num_hidden_layers", 2, 3),
        ("head_dim", 32, 16),
        ("model_type", "mistral", "llama"),
    ],
)
def test_teacher_that_cannot_be_the_original_is_refused(name, value, own):
    teacher = original()
    student = student_of(teacher)
    check_teacher(student.config, teacher.config)
    kind = MistralConfig if name == "model_type" else LlamaConfig
    other = kind(**SIZES | ({"head_dim": 16} | ({} if name == "model_type" else {name: value})))
    with pytest.raises(ValueError, match=f"student's {name}: got {value} in the teacher and {own} in the"):
        check_teacher(student.config, other)


def test_latent_teacher_is_refused(tmp_path):
    student = student_of(original())
    prepare_for_training(student, recipe())
    with pytest.raises(
        ValueError, match="must be the original model: got a latent one of type kv_latent_llama"
    ):
        run(student, student_of(original()), 1, tmp_path, recipe())


def test_teacher_of_another_shape_is_refused(tmp_path):
    teacher = original()
    student = student_of(teacher)
    prepare_for_training(student, recipe())
    with pytest.raises(ValueError, match="hidden_size: got 64 in the teacher and 32 in the student"):
        run(student, original("phi3"), 1, tmp_path, recipe())
    with pytest.raises(ValueError, match="pass it as the teacher"):
        run(student, None, 2, tmp_path, recipe())
    assert not list(tmp_path.iterdir())
    assert run(student, None, 2, tmp_path, recipe("stage2.objective=next_token"))["steps"] == 8


def test_unprepared_models_wrong_stages_and_empty_data_are_refused(tmp_path):
    teacher = original()
    student = student_of(teacher)
    with pytest.raises(ValueError, match="call prepare_for_training"):
        run(student, teacher, 1, tmp_path, recipe())
    prepare_for_training(student, recipe())
    with pytest.raises(ValueError, match="already carries LoRA"):
        prepare_for_training(student, recipe())
    with pytest.raises(ValueError, match="got stage=3"):
        run(student, teacher, 3, tmp_path, recipe())
    with pytest.raises(ValueError, match="at least 1 block"):
        train_stage(student, teacher, 1, [], recipe(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_work_directory_belongs_to_one_run(tmp_path):
    teacher = original()
    student = student_of(teacher)
    prepare_for_training(student, recipe())
    summary = run(student, teacher, 1, tmp_path, recipe())
    assert run(student, teacher, 1, tmp_path, recipe("stage1.save_steps=5")) == summary  # decides nothing
    with pytest.raises(ValueError, match=r"settings.learning_rate \(0.01, now 0.02\)"):
        run(student, teacher, 1, tmp_path, recipe("stage1.learning_rate=0.02"))
    with pytest.raises(ValueError, match="another blocks"):
        run(student, teacher, 1, tmp_path, recipe(), blocks(seed=2))
    final = tmp_path / "final.safetensors"
    final.write_bytes(final.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"final\.safetensors is damaged; delete it to go on from the stage"):
        run(student, teacher, 1, tmp_path, recipe())
    final.unlink()
    assert run(student, teacher, 1, tmp_path, recipe()) == summary


NEITHER_HASHED = ("save_steps", "keep", "log_steps", "spike_factor")  # they decide nothing, or were not there


def test_a_stage_of_the_release_before_is_continued(tmp_path):
    """What decides a stage is hashed as 0.1.0 did: all names and shapes, samples of frozen weights and of blocks."""
    student, config, rows = student_of(original()), recipe(), blocks()
    prepare_for_training(student, config)
    hashed = {"trained": b"", "frozen": b""}
    for name, parameter in student.named_parameters():
        about = f"{name} {tuple(parameter.shape)}"
        if not parameter.requires_grad:
            values = parameter.flatten()
            about += f" {values[:: max(1, values.numel() // 64)][:64].tolist()}"
        hashed["trained" if parameter.requires_grad else "frozen"] += f"{about};".encode()
    settings = config.stage1.model_dump(mode="json")
    plan = {
        "stage": 1,
        "seed": 0,
        "dtype": "float32",
        "settings": {k: v for k, v in settings.items() if k not in NEITHER_HASHED},
        "lora": config.lora.model_dump(mode="json"),
        **{name: hashlib.sha256(content).hexdigest() for name, content in hashed.items()},
        "blocks": [
            24,
            hashlib.sha256(b"".join(row["input_ids"].numpy().tobytes() for row in rows)).hexdigest(),
        ],
    }
    (tmp_path / "stage.json").write_text(json.dumps(plan, indent=2))
    assert run(student, original(), 1, tmp_path, config)["steps"] == 8
    assert json.loads((tmp_path / "stage.json").read_text()) == plan
