"""Stage I with one layer's graph at a time: the numbers of the form that holds all, its memory, and the student's own stream."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Stage1
from kvlatent.training.layer_loss import capture, layer_losses, layer_losses_one_at_a_time
from kvlatent.training.loop import collate
from kvlatent.training.placement import place_teacher, view_of_teacher
from kvlatent.training.trainable import prepare_for_training, trainable_state
from kvlatent.training.trainers import LayerTrainer, first_own_step
from tiny import tiny_model
from training_setup import blocks, hashes, original, recipe, run, student_of

CPU = torch.device("cpu")


def batch():
    rows = collate(blocks(3))
    return {key: rows[key] for key in ("input_ids", "position_ids")}


def prepared(teacher, *overrides, **options):
    student = student_of(teacher, **options)
    prepare_for_training(student, recipe(*overrides))
    return student.train()


def by_hooks(student, teacher, inputs, **options):
    return layer_losses(student.get_decoder(), capture(teacher.get_decoder(), inputs), inputs, **options)


def one_at_a_time(student, teacher, inputs, **options):
    return layer_losses_one_at_a_time(student.get_decoder(), teacher.get_decoder(), inputs, **options)


def gradients(student):
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "granite", "gpt-neox", "qwen3.5"])
def test_losses_and_gradients_are_those_of_all_graphs_at_once(family, own_stream):
    teacher = original(family) if family in ("llama", "qwen2", "phi3") else tiny_model(family)
    student = convert(teacher, d_qk=8, d_vo=8, preset="own-frequency")
    prepare_for_training(student.train(), recipe())
    inputs, found = batch(), []
    for form in (by_hooks, one_at_a_time):
        student.zero_grad()
        losses = form(student, teacher, inputs, own_stream=own_stream)
        losses.mean().backward()
        found.append((losses.detach(), gradients(student)))
    (losses, whole), (again, single) = found
    assert torch.equal(losses, again) and losses.min() >= 0 and losses.max() > 1e-5
    assert whole.keys() == single.keys() and len(whole) > 3
    assert all(torch.equal(whole[name], single[name]) for name in whole)


def test_accumulated_gradients_are_weighted_alike():
    teacher, found = original(), []
    student, inputs = prepared(teacher), batch()
    for form in (by_hooks, one_at_a_time):
        student.zero_grad()
        for share in (0.3, 0.7):
            (form(student, teacher, inputs).mean() * share).backward()
        found.append(gradients(student))
    for name, gradient in found[0].items():  # the share is a factor of the last product instead of the first
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)


def test_on_the_own_stream_a_layer_sees_what_the_student_gave_and_aims_at_the_original():
    teacher = original()
    student, inputs = prepared(teacher), batch()
    decoder = student.get_decoder()
    with torch.no_grad():
        wanted = capture(teacher.get_decoder(), inputs)
        own = capture(decoder, inputs)
        expected = torch.stack([(o - w).square().mean() for o, w in zip(own[1:], wanted[1:], strict=True)])
    losses = one_at_a_time(student, teacher, inputs, own_stream=True)
    torch.testing.assert_close(losses.detach(), expected)
    assert (losses[1:] > 1.02 * one_at_a_time(student, teacher, inputs)[1:]).all()  # errors travel up
    losses[2].backward()
    touched = {name.split(".")[2] for name, gradient in gradients(student).items() if gradient.any()}
    assert touched == {"2"}  # gradients do not travel down


class Saved:
    """Bytes that graphs hold of what they have saved, now and at their most; parameters are not counted."""

    def __init__(self, model) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.now = self.most = 0

    def pack(self, tensor):
        holder = _Holder(tensor)
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(holder, self.free, size)
        return holder

    def free(self, size):
        self.now -= size


class _Holder:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


def most_saved(form, student, teacher, inputs) -> int:
    saved = Saved(student)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda holder: holder.tensor):
        form(student, teacher, inputs).mean().backward()
    return saved.most


def test_one_layers_graph_is_alive_at_a_time():
    teacher = tiny_model("llama", num_hidden_layers=6)
    student, inputs = prepared(teacher), batch()
    whole, single = (most_saved(form, student, teacher, inputs) for form in (by_hooks, one_at_a_time))
    assert single < 1.1 * whole / 6


def test_a_run_ends_with_the_same_weights_as_with_all_graphs(tmp_path, monkeypatch):
    ends = []
    for sharded in (False, True):
        teacher = original()
        student = prepared(teacher)
        init = LayerTrainer.__init__

        def start(self, *args, init=init, sharded=sharded, **options):
            init(self, *args, **options)
            self.is_sharded = sharded

        with monkeypatch.context() as patch:
            patch.setattr(LayerTrainer, "__init__", start)
            patch.setattr(LayerTrainer, "_clip_grad_norm", lambda self, model: torch.tensor(1.0))
            run(student, teacher, 1, tmp_path / str(sharded), recipe("stage1.own_stream=0.5"))
        ends.append(hashes(student))
    assert ends[0] == ends[1]


def test_a_layer_learns_the_same_whatever_the_others_gradients_are(tmp_path):
    ends = []
    for scale in (1, 50):
        teacher = original()
        student = prepared(teacher)
        with torch.no_grad():
            teacher.get_decoder().layers[2].mlp.down_proj.weight.mul_(scale)  # shared: the student's, too
        run(student, teacher, 1, tmp_path / str(scale), recipe("stage1.max_grad_norm=1e-4"))
        ends.append({name: tensor.clone() for name, tensor in trainable_state(student).items()})
    same = {name for name, tensor in ends[0].items() if torch.equal(tensor, ends[1][name])}
    assert {name.split(".")[2] for name in same} == {"0", "1"}
    assert {name.split(".")[2] for name in ends[0].keys() - same} == {"2"}


@pytest.mark.parametrize(("share", "first"), [(0.0, 8), (0.25, 6), (0.5, 4), (1.0, 0)])
def test_the_own_stream_begins_at_its_share_of_the_steps(share, first):
    assert first_own_step(Stage1(own_stream=share), 8) == first


def test_the_last_steps_of_a_run_see_the_own_stream(tmp_path):
    teacher = original()
    student, seen = prepared(teacher), []
    layers = student.get_decoder().layers
    outputs = {}
    layers[0].register_forward_hook(lambda module, args, output: outputs.update(own=output))
    original_forward = layers[1].forward

    def forward(hidden_states, *args, **kwargs):
        seen.append(bool(torch.equal(hidden_states, outputs["own"])))
        return original_forward(hidden_states, *args, **kwargs)

    layers[1].forward = forward
    run(student, teacher, 1, tmp_path, recipe("stage1.own_stream=0.25"))
    assert seen == [False] * 12 + [True] * 4  # two forwards a step


def test_what_student_and_original_have_in_common_is_in_memory_once():
    teacher = original("llama-tied")
    student = prepared(copy.deepcopy(teacher))
    view = place_teacher(student, teacher, "float32", CPU)
    own = [p for n, p in teacher.named_parameters() if ".self_attn." in n]
    assert unique_bytes(view, student) == unique_bytes(student) + sum(4 * p.numel() for p in own)
    assert unique_bytes(teacher, student) > unique_bytes(view, student)
    assert hashes(view) == hashes(teacher)


def test_a_bfloat16_original_in_float32_costs_its_attention_alone():
    teacher = original("llama", torch.bfloat16)
    student = prepared(copy.deepcopy(teacher), "dtype=float32")
    view = view_of_teacher(student, teacher, "float32")
    own = [p for n, p in view.named_parameters() if ".self_attn." in n]
    assert unique_bytes(view, student) == unique_bytes(student) + sum(4 * p.numel() for p in own)
    assert {p.dtype for p in view.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_a_tensor_with_other_numbers_stays_the_originals():
    teacher = original()
    student = student_of(copy.deepcopy(teacher))
    with torch.no_grad():
        student.get_decoder().layers[1].mlp.up_proj.weight[0, 0] += 1
    prepare_for_training(student, recipe())
    view = view_of_teacher(student, teacher, "float32")
    assert hashes(view) == hashes(teacher)


def unique_bytes(*models) -> int:
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()
    }
    return sum(storages.values())
