"""Flex attention on a CPU: inference at unequal widths; training is refused with a sentence."""

import pytest
import torch

from kvlatent.conversion.convert_model import convert
from tiny import logits, padded, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale

# torch 2.13's compiler warns about its own and transformers' use of it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# torch 2.13's own kernel: without vector instructions it does not compile, and under avx2 plain flex_attention, queries
# and keys and values all 16 wide, gives NaN or other numbers than sdpa; its compile cache then serves them to avx512.
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"),
    reason="torch's flex attention on a CPU needs avx512 to be right at these widths",
)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3-longrope"])
def test_flex_agrees_with_sdpa_and_is_causal(name):
    latent = convert(tiny_model(name), d_qk=16, d_vo=8, preset="paper")
    x = tokens(length=40)  # one length throughout: every other length compiles again
    short = x[:, :35]
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100 + 3
    expected, expected_short = logits(latent, x), logits(latent, short)
    latent.set_attn_implementation("flex_attention")
    for training in (False, True):
        latent.train(training)
        assert_close_to_scale(logits(latent, x), expected, ROUNDING)
        assert_close_to_scale(logits(latent, changed)[:, :-1], expected[:, :-1], ROUNDING)
        ids, mask = padded(short, 5)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left_padded = logits(latent, ids, attention_mask=mask, position_ids=positions)[:, 5:]
        assert_close_to_scale(left_padded, expected_short, ROUNDING)
        ids[:, -1] = changed[:, -1]
        left_padded = logits(latent, ids, attention_mask=mask, position_ids=positions)[:, 5:]
        assert_close_to_scale(left_padded[:, :-1], expected_short[:, :-1], ROUNDING)
    assert (logits(latent, changed)[:, -1] - expected[:, -1]).abs().max() > 0.1


# The decoder makes its mask, which torch compiles, before the first layer can refuse.
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's flex attention does not compile without vector instructions",
)
def test_training_with_flex_on_a_cpu_is_refused():
    latent = convert(tiny_model("llama"), d_qk=16, d_vo=8, preset="paper")
    latent.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="no backward pass on a CPU: train with attn_implementation='sdpa'"):
        latent(tokens())
