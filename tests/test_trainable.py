"""Which tensors are trained, that the original stays as it was, and what the exported copy is."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from kvlatent.training.placement import place_teacher
from kvlatent.training.trainable import merged_copy, prepare_for_training, trainable_names
from tolerances import ROUNDING, assert_close_to_scale
from training_setup import digest, hashes, original, recipe, run, student_of

IDS = torch.arange(1, 25).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def layer_names(index: int, modules: list[str]) -> list[str]:
    return [f"model.layers.{index}.{module}" for module in modules]


LORA = ["lora_A.default.weight", "lora_B.default.weight"]
EXPECTED = {
    "llama": [f"self_attn.{m}_proj.weight" for m in "kqvo"]
    + [f"mlp.{m}_proj.{a}" for m in ("gate", "up", "down") for a in LORA],
    "qwen2": [f"self_attn.{m}_proj.weight" for m in "kqvo"]
    + [f"self_attn.{m}_proj.bias" for m in "kqv"]
    + [f"mlp.{m}_proj.{a}" for m in ("gate", "up", "down") for a in LORA],
    "phi3": ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight"]
    + [f"mlp.{m}_proj.{a}" for m in ("gate_up", "down") for a in LORA],
}


@pytest.mark.parametrize("family", EXPECTED)
def test_trained_names_are_exactly_these(family):
    student = student_of(original(family))
    names = prepare_for_training(student, recipe())
    assert names == sorted(name for index in range(3) for name in layer_names(index, EXPECTED[family]))
    assert names == sorted(name for name, p in student.named_parameters() if p.requires_grad)
    assert names == trainable_names(student)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "phi3"])
def test_original_is_untouched_and_merge_keeps_the_function(family, tmp_path):
    teacher = original(family)
    before, flags = hashes(teacher), {n: p.requires_grad for n, p in teacher.named_parameters()}
    student = student_of(teacher)
    config = recipe()
    untrained = logits(student)
    prepare_for_training(student, config)
    assert torch.equal(logits(student), untrained)  # LoRA starts at zero effect
    start = hashes(student)
    first = run(student, teacher, 1, tmp_path / "1", config)
    second = run(student, teacher, 2, tmp_path / "2", config)
    trained = logits(student)
    kept = hashes(student)
    merged = merged_copy(student)

    assert hashes(teacher) == before
    assert {n: p.requires_grad for n, p in teacher.named_parameters()} == flags
    assert hashes(student) == kept
    changed = {name for name in start if start[name] != kept[name]}
    assert changed == set(trainable_names(student))
    assert_close_to_scale(logits(merged), trained, ROUNDING)  # W + BA in fp32, another order
    assert (trained - untrained).abs().max() > 1e-2
    assert set(merged.state_dict()) == set(student_of(teacher).state_dict())
    shared = merged.get_input_embeddings().weight
    assert shared.data_ptr() == teacher.get_input_embeddings().weight.data_ptr()
    if family == "llama-tied":
        assert merged.get_output_embeddings().weight is shared
    assert first["steps"] == second["steps"] == 8
    assert first["tokens"] == second["tokens"] == 512
    assert first["last_loss"] < 0.8 * first["first_loss"]
    assert len(first["layer_losses"]) == 3
    assert math.isclose(sum(first["layer_losses"]) / 3, first["last_loss"], rel_tol=1e-5)


def test_original_is_untouched_where_the_student_shares_its_attention(tmp_path):
    """Full width converts by sharing: training must not write through."""
    teacher = original()
    before = hashes(teacher)
    student = student_of(teacher, width=16)
    assert torch.equal(logits(student), logits(teacher))
    config = recipe("stage2.objective=next_token")
    prepare_for_training(student, config)
    run(student, None, 2, tmp_path, config)
    assert hashes(teacher) == before
    assert not torch.equal(logits(student), logits(teacher))


def test_bfloat16_source_trains_fp32_masters_and_exports_bfloat16(tmp_path):
    teacher = original("llama", torch.bfloat16)
    before = hashes(teacher)
    for dtype in ("bfloat16", "float32"):
        student = student_of(teacher)
        config = recipe(f"dtype={dtype}")
        names = set(prepare_for_training(student, config))
        for name, parameter in student.named_parameters():
            fp32 = name in names or dtype == "float32"
            assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        summary = [run(student, teacher, s, tmp_path / f"{dtype}{s}", config) for s in (1, 2)]
        assert summary[0]["last_loss"] < summary[0]["first_loss"]
        final = load_file(tmp_path / f"{dtype}2" / "final.safetensors")
        assert {tensor.dtype for tensor in final.values()} == {torch.float32}
        merged = merged_copy(student)
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert hashes(teacher) == before


def test_lora_rank_zero_trains_the_attention_alone(tmp_path):
    teacher = original()
    student = student_of(teacher)
    config = recipe("lora.rank=0")
    names = prepare_for_training(student, config)
    assert names
    assert not [name for name in names if "lora" in name]
    run(student, teacher, 1, tmp_path, config)
    merged = merged_copy(student)
    torch.testing.assert_close(logits(merged), logits(student), atol=0, rtol=0)


def test_lora_start_depends_on_the_recipe_seed_only():
    def start(seed):
        student = student_of(original())
        torch.manual_seed(seed + 100)
        before = torch.random.get_rng_state()
        prepare_for_training(student, recipe(f"seed={seed}"))
        assert torch.equal(torch.random.get_rng_state(), before)
        return {n: digest(p) for n, p in student.named_parameters() if "lora_A" in n}

    assert start(3) == start(3)
    assert start(3) != start(4)


def test_student_and_teacher_share_what_they_share_after_the_move():
    teacher = original()
    student = student_of(teacher)
    prepare_for_training(student, recipe())
    view = place_teacher(student, teacher, "float32", torch.device("cpu"))
    own = dict(student.named_parameters())
    for name, parameter in view.named_parameters():
        twin = own.get(name.replace("_proj.weight", "_proj.base_layer.weight") if "mlp" in name else name)
        shared = "self_attn" not in name
        assert (parameter.data_ptr() == twin.data_ptr()) == shared, name
    assert not any(parameter.requires_grad for parameter in view.parameters())
    assert torch.equal(logits(view), logits(teacher))
