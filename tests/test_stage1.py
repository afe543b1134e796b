"""Stage I: 0 at identity, gradients stay in their layer, and the loss is what two plain lines say it is."""

from __future__ import annotations

import pytest
import torch

from kvlatent.training.layer_loss import capture, layer_losses
from kvlatent.training.loop import collate
from training_setup import blocks, original, student_of


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3"])
def pair(request):
    teacher = original(request.param)
    return teacher, student_of(teacher)


def batch():
    rows = collate(blocks(3))
    return {key: rows[key] for key in ("input_ids", "position_ids")}


def by_hand(teacher, student, inputs):
    """Every student layer called on the original's hidden state, one at a time, with the student's own
    extras."""
    with torch.no_grad():
        states = teacher.get_decoder()(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    calls = {}
    decoder = student.get_decoder()
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: calls.update({layer: kwargs}), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    decoder(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    # The last entry of hidden_states is normed, so the last layer's output comes from calling the original's layer.
    outputs = list(states[1:-1])
    last = teacher.get_decoder().layers[-1]
    with torch.no_grad():
        kept = {}
        handle = last.register_forward_pre_hook(lambda m, args, kwargs: kept.update(kwargs), with_kwargs=True)
        teacher.get_decoder()(**inputs, use_cache=False)
        handle.remove()
        outputs.append(last(states[-2], **kept))
    return torch.stack(
        [
            (layer(state, **calls[layer]) - target).pow(2).mean()
            for layer, state, target in zip(decoder.layers, states[:-1], outputs, strict=True)
        ]
    )


def test_losses_equal_single_layer_calls(pair):
    teacher, student = pair
    inputs = batch()
    losses = layer_losses(student.get_decoder(), capture(teacher.get_decoder(), inputs), inputs)
    assert losses.dtype == torch.float32
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, by_hand(teacher, student, inputs))
    assert losses.min() > 1e-4  # the narrower layers do differ


def test_loss_is_zero_at_identity_and_not_after_a_change(pair):
    teacher, student = pair
    inputs = batch()
    captured = capture(teacher.get_decoder(), inputs)
    assert layer_losses(teacher.get_decoder(), captured, inputs).tolist() == [0.0, 0.0, 0.0]
    assert layer_losses(student.get_decoder(), captured, inputs).min() > 0


def test_gradient_stays_in_its_layer(pair):
    teacher, student = pair
    inputs = batch()
    captured = capture(teacher.get_decoder(), inputs)
    for index in range(3):
        student.zero_grad()
        layer_losses(student.get_decoder(), captured, inputs)[index].backward()
        touched = {
            name.split(".")[2] for name, parameter in student.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }  # fmt: skip
        assert touched == {str(index)}
    student.zero_grad()


def test_hooks_are_gone_even_after_an_error(pair, monkeypatch):
    teacher, student = pair
    inputs = batch()

    def hooks():
        modules = [*teacher.modules(), *student.modules()]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    before = hooks()  # transformers leaves its own after output_hidden_states
    captured = capture(teacher.get_decoder(), inputs)
    layer_losses(student.get_decoder(), captured, inputs)
    assert hooks() == before

    def broken(*args, **kwargs):
        assert hooks() > before
        raise RuntimeError("broken layer")

    monkeypatch.setattr(student.get_decoder().layers[1].mlp, "forward", broken)
    monkeypatch.setattr(teacher.get_decoder().layers[1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        layer_losses(student.get_decoder(), captured, inputs)
    with pytest.raises(RuntimeError, match="broken layer"):
        capture(teacher.get_decoder(), inputs)
    assert hooks() == before


def test_captured_states_of_another_depth_are_refused(pair):
    teacher, student = pair
    inputs = batch()
    captured = capture(teacher.get_decoder(), inputs)
    with pytest.raises(ValueError, match="got 3 states for 3 layers"):
        layer_losses(student.get_decoder(), captured[:-1], inputs)
