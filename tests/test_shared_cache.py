"""Layers that share one cache: exact where sharing changes nothing, causal, and the same with a cache as without."""

import copy

import pytest
import torch

from kvlatent.conversion.convert_model import convert
from kvlatent.model.cache_bytes import live_cache_bytes
from kvlatent.training.trainable import merged_copy
from kvlatent_lab.shared_cache import SHARED, Follower, share_cache
from tiny import logits, padded, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale
from training_setup import hashes


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-mha", num_key_value_heads=2)


def twinned(model):
    """Layer 0 leaves the stream as it is, and layer 1 has its keys, values and norm: so its keys are those of layer 0."""
    model = copy.deepcopy(model)
    first, second, _ = model.model.layers
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for part in ("k_proj", "v_proj"):
            getattr(second.self_attn, part).weight.copy_(getattr(first.self_attn, part).weight)
        second.input_layernorm.weight.copy_(first.input_layernorm.weight)
    return model


@pytest.mark.parametrize("shared", SHARED)
def test_layers_with_equal_keys_and_values_lose_nothing(model, shared):
    equal, x = twinned(model), tokens()
    made = share_cache(equal, shared, 32, 32)
    assert isinstance(made.model.layers[1].self_attn, Follower)
    assert_close_to_scale(logits(made, x), logits(equal, x), ROUNDING)
    assert (logits(share_cache(model, shared, 32, 32), x) - logits(model, x)).abs().max() > 0.1


@pytest.mark.parametrize("shared", SHARED)
def test_narrow_shared_layers_are_what_narrow_ones_are_where_sharing_changes_nothing(model, shared):
    """The layer alone at the end is converted as always; a pair whose second layer reads nothing, as its first alone."""
    alone, x = copy.deepcopy(model), tokens()
    with torch.no_grad():
        for weight in (
            alone.model.layers[1].self_attn.o_proj.weight,
            alone.model.layers[1].self_attn.q_proj.weight,
        ):
            weight.zero_()
        alone.model.layers[1].self_attn.k_proj.weight.copy_(alone.model.layers[0].self_attn.k_proj.weight)
        alone.model.layers[1].self_attn.v_proj.weight.copy_(alone.model.layers[0].self_attn.v_proj.weight)
    expected = convert(alone, d_qk=16, d_vo=16, preset="own-frequency", keys="weights", table="head")
    assert_close_to_scale(logits(share_cache(alone, shared, 16, 16), x), logits(expected, x), 10 * ROUNDING)
    assert (logits(expected, x) - logits(alone, x)).abs().max() > 0.1


@pytest.mark.parametrize(("d_qk", "d_vo"), [(32, 32), (16, 12)])
def test_it_is_causal_and_the_same_with_a_cache_whose_bytes_are_halved(model, d_qk, d_vo):
    made, x = share_cache(model, "mean", d_qk, d_vo), tokens()
    before = hashes(model)
    whole = logits(made, x)
    changed = x.clone()
    changed[:, 30:] = 5
    assert torch.equal(logits(made, changed)[:, :30], whole[:, :30])
    start = made(x[:, :20], use_cache=True)
    cache, parts = start.past_key_values, [start.logits]
    for at in range(20, x.shape[1]):
        parts.append(made(x[:, at : at + 1], past_key_values=cache).logits)
    assert_close_to_scale(torch.cat(parts, 1), whole, ROUNDING)
    # two of three layers cache 2 heads of d_qk + d_vo channels, 4 bytes each, for 2 sequences
    assert live_cache_bytes(cache) == 2 * 2 * (d_qk + d_vo) * 4 * x.numel()
    ids, mask = padded(x)
    assert_close_to_scale(logits(made, ids, attention_mask=mask)[:, -x.shape[1] :], whole, ROUNDING)
    assert hashes(model) == before


def test_a_copy_reads_its_own_layers(model):
    made, x = share_cache(model, "mean", 16, 16), tokens()
    twin, whole = merged_copy(made), logits(made, x)
    with torch.no_grad():
        made.model.layers[0].self_attn.k_proj.weight.data = torch.zeros_like(
            made.model.layers[0].self_attn.k_proj.weight
        )
    assert torch.equal(logits(twin, x), whole)
    assert not torch.equal(logits(made, x), whole)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "mistral", "llama"])
def test_only_plain_attention_is_shared(family):
    with pytest.raises(ValueError, match="plain attention .* take a Llama"):
        share_cache(tiny_model(family), "mean", 16, 16)


def test_there_are_two_ways_to_share(model):
    with pytest.raises(ValueError, match="the mean or the first of their projections: got 'last'"):
        share_cache(model, "last", 16, 16)
