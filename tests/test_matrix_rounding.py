"""Matrices as coarse as an export has them: the values of each type, and a model that is what it was afterwards."""

import pytest
import torch

from kvlatent.engines.matrix_rounding import MatrixRounding, relative_difference, rounded
from tiny import tiny_model, tokens


def blocks_of_eight_bits(values):
    """By hand: 32 values share a float16 scale, the largest is 127."""
    blocks = values.unflatten(-1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales).round() * scales.half().float()).flatten(-2)


def test_values_of_every_type():
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(values, "f16"), values.half().float())
    assert torch.equal(rounded(values, "bf16"), values.bfloat16().float())
    torch.testing.assert_close(rounded(values, "q8_0"), blocks_of_eight_bits(values), rtol=1e-6, atol=0)
    short = values[:, :40]
    assert torch.equal(rounded(short, "q8_0"), short.half().float())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@torch.no_grad()
def test_a_model_computes_so_and_is_itself_again(name):
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = model(tokens(), use_cache=False).logits
    found = {}
    for dtype in ("f16", "bf16", "q8_0"):
        for inputs in (False, True):
            with MatrixRounding(dtype, inputs).applied(model):
                found[dtype, inputs] = relative_difference(model(tokens(), use_cache=False).logits, ours)
    assert 0 < found["f16", False] < found["f16", True] < found["bf16", False] < found["bf16", True]
    assert found["q8_0", False] < found["q8_0", True]
    assert torch.equal(model(tokens(), use_cache=False).logits, ours)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    linear, before = model.lm_head, model.lm_head.weight.clone()
    with pytest.raises(RuntimeError), MatrixRounding("bf16", True).applied(model):
        linear(torch.zeros(1, 3))
    assert torch.equal(linear.weight, before)


def test_a_difference_is_relative_to_the_spread():
    wanted = torch.tensor([0.0, 2.0, 4.0])  # a standard deviation of 2
    assert relative_difference(wanted + 1, wanted) == 0.5
