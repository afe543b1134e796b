import copy
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlatent.conversion.convert_model import convert
from kvlatent.model import classes as modeling
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import effective_table
from kvlatent.model.rotary import frequency_aware_exponents
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.latent_config import choose
from tiny import FAMILIES, HEAD_DIM, logits, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale, assert_same_model

pytestmark = pytest.mark.numerics


def digest(model):
    state = model.state_dict()
    return {n: hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for n, t in state.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_is_untouched_and_the_rest_is_shared(name):
    model = tiny_model(name)
    before, config_before, x = digest(model), model.config.to_dict(), tokens()
    expected = logits(model, x)
    latent = convert(model, d_qk=16, d_vo=8, preset="own-frequency")
    assert digest(model) == before and model.config.to_dict() == config_before
    assert torch.equal(logits(model, x), expected)
    ours = latent.state_dict()
    for key, tensor in model.state_dict().items():
        if ".self_attn." not in key:
            assert ours[key].data_ptr() == tensor.data_ptr()
            assert latent.get_parameter(key) is not model.get_parameter(key)
    tied = latent.lm_head.weight is latent.model.embed_tokens.weight
    assert tied == bool(model.config.tie_word_embeddings)
    assert not list(latent.buffers()) and all(p.device.type == "cpu" for p in latent.parameters())


def test_preset_paper_is_the_papers_equation_5_and_its_table():
    model = tiny_model("llama")
    latent = convert(model, d_qk=16, d_vo=8, preset="paper")
    config = latent_config_of(latent.config)
    assert config.tables[0][0].short == tuple(1e4**-e for e in frequency_aware_exponents(16))
    old, new = model.model.layers[1].self_attn, latent.model.layers[1].self_attn
    assert new.scaling == 16**-0.5
    for projection, heads, stride in (("q_proj", 4, 2), ("k_proj", 2, 2), ("v_proj", 2, 4)):
        w = getattr(old, projection).weight.view(heads, HEAD_DIM, -1)[:, ::stride]
        b = getattr(old, projection).bias.view(heads, HEAD_DIM)[:, ::stride]
        assert torch.equal(getattr(new, projection).weight, w.flatten(0, 1))
        assert torch.equal(getattr(new, projection).bias, b.flatten())
    assert torch.equal(new.o_proj.weight, old.o_proj.weight.view(-1, 4, HEAD_DIM)[:, :, ::4].flatten(1))
    assert torch.equal(new.o_proj.bias, old.o_proj.bias)


@pytest.mark.parametrize("keys", ["stride", "matched"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_pairs_keep_their_own_frequency_and_the_original_scale(name, keys):
    model = tiny_model(name)
    latent = convert(model, d_qk=16, d_vo=16, keys=keys, frequencies="own", preset="paper")
    config, table = latent_config_of(latent.config), effective_table(model.config)
    (channels,), (kept,) = config.channels[0], config.tables[0]
    pairs = channels[: kept.rotary_dim // 2]
    assert kept == table.subset(pairs)
    assert channels[kept.rotary_dim // 2 : kept.rotary_dim] == tuple(p + table.rotary_dim // 2 for p in pairs)
    attention, original = latent.model.layers[0].self_attn, model.model.layers[0].self_attn
    fold = original.scaling / attention.scaling
    if "qwen3" in name:
        rows = torch.eye(HEAD_DIM)[list(channels)] * fold
        torch.testing.assert_close(attention.q_map.detach(), rows.expand(4, 16, HEAD_DIM))
        assert attention.q_proj.weight.data_ptr() == original.q_proj.weight.data_ptr()
    else:
        source = original.qkv_proj if hasattr(original, "qkv_proj") else original.q_proj
        ours = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
        expected = source.weight[: 4 * HEAD_DIM].view(4, HEAD_DIM, -1)[:, list(channels)] * fold
        torch.testing.assert_close(ours.weight[: 4 * 16], expected.flatten(0, 1))
        if ours.bias is not None:
            bias = source.bias[: 4 * HEAD_DIM].view(4, HEAD_DIM)[:, list(channels)] * fold
            torch.testing.assert_close(ours.bias[: 4 * 16], bias.flatten())


def test_paper_with_another_choice_keeps_the_original_scale():
    assert resolve_choices("paper").scale == "d_qk"
    assert resolve_choices("paper", values="svd").scale == "original"
    assert resolve_choices("own-frequency").scale == "original"


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "phi3"])
def test_factored_values_of_a_low_rank_model_are_exact(name):
    model = tiny_model(name)
    kv_heads = model.config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:  # make W_V of rank 8 per head
            attention = layer.self_attn
            fused = hasattr(attention, "qkv_proj")
            projection = attention.qkv_proj if fused else attention.v_proj
            rows = projection.weight[-kv_heads * HEAD_DIM :].view(kv_heads, HEAD_DIM, -1)
            u = torch.linalg.qr(
                torch.randn(kv_heads, HEAD_DIM, 8, generator=torch.Generator().manual_seed(5))
            )[0]
            rows.copy_(u @ (u.mT @ rows))
            if projection.bias is not None:
                bias = projection.bias[-kv_heads * HEAD_DIM :].view(kv_heads, HEAD_DIM, 1)
                bias.copy_(u @ (u.mT @ bias))
    x = tokens()
    expected = logits(model, x)
    factored = convert(model, d_vo=8, preset="own-frequency")
    assert_close_to_scale(
        logits(factored, x), expected, 3 * ROUNDING
    )  # factored in float64, rounded once more
    assert (logits(convert(model, d_vo=8, preset="paper"), x) - expected).abs().max() > 0.1  # a slice is not


def test_a_sliced_qk_norm_is_an_option():
    model = tiny_model("qwen3")
    latent = convert(model, d_qk=16, d_vo=16, frequencies="own", qk_norm="sliced", preset="paper")
    attention, original = latent.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert attention.q_norm.weight.shape == (16,) and attention.kept is None and attention.q_map is None
    channels = list(latent_config_of(latent.config).channels[0][0])
    k = original.k_proj.weight.view(2, HEAD_DIM, -1)[:, channels]
    assert torch.equal(attention.k_proj.weight, k.flatten(0, 1))
    ratio = (k.square().mean() / original.k_proj.weight.square().mean()).sqrt()
    torch.testing.assert_close(attention.k_norm.weight, original.k_norm.weight[channels] * ratio)
    full = convert(model, d_qk=16, d_vo=16, frequencies="own", preset="paper")
    assert not torch.equal(logits(full, tokens()), logits(latent, tokens()))
    identity = convert(model, d_qk=HEAD_DIM, d_vo=HEAD_DIM, qk_norm="sliced", preset="paper")
    assert torch.equal(logits(identity, tokens()), logits(model, tokens()))
    one_head = latent_config_of(latent.config)
    per_head = type(one_head)(
        **{**vars(one_head), "tables": (one_head.tables[0] * 2,), "channels": (one_head.channels[0] * 2,)}
    )
    with pytest.raises(ValueError, match="must keep the same channels: got 2 lists; use qk_norm='full'"):
        convert(model, per_head)


def test_bfloat16_weights_stay_bfloat16():
    model = tiny_model("llama").bfloat16()
    latent = convert(model, d_qk=16, d_vo=8, preset="own-frequency")
    assert {p.dtype for p in latent.parameters()} == {torch.bfloat16}


BAD = [
    ({"d_qk": 15, "d_vo": 8}, "d_qk must be even.*try 14 or 16"),
    ({"d_qk": 34, "d_vo": 8}, "d_qk cannot exceed head_dim: got d_qk=34, head_dim=32; try 16"),
    ({"d_qk": 0, "d_vo": 8}, "positive integer: got d_qk=0"),
    ({"d_qk": 16, "d_vo": -8}, "positive integer: got d_vo=-8"),
    ({"d_qk": 12, "d_vo": 8}, "divisible by d_qk: got d_qk=12, head_dim=32; try 8 or 16"),
    ({"d_qk": 16, "d_vo": 12}, "divisible by d_vo: got d_vo=12, head_dim=32; try 8 or 16"),
    ({"d_qk": 2, "d_vo": 8}, "frequency-aware table needs a rotated width divisible by 4: got 2; try 4"),
    ({"d_qk": [16, 16], "d_vo": 8}, "one width per layer: got 2 for 3 layers"),
    ({"d_qk": 16, "d_vo": [8] * 4}, "one width per layer: got 4 for 3 layers"),
    ({"d_qk": 24, "keys": "matched"}, "matched pairs need.*d_qk=24, head_dim=32.*try 16"),
    ({"d_qk": 16, "preset": "magic"}, "unknown preset 'magic'; choose one of calibrated, paper"),
    ({"d_qk": 16, "keys": "magic"}, "unknown keys 'magic'; choose one of stride, matched"),
    ({"d_qk": 16, "qk_norm": "magic"}, "unknown qk_norm 'magic'; choose one of full, sliced"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_impossible_widths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(tiny_model("llama"), **{"preset": "paper", **arguments})


def test_partial_rotary_needs_a_proportional_width():
    config = tiny_model("phi3-longrope").config
    with pytest.raises(ValueError, match="d_qk=2 of head_dim=32 with 16 rotated gives 1; try 4"):
        choose(config, 2, 8, resolve_choices("own-frequency"))
    assert choose(config, 8, 8, resolve_choices("paper")).tables[0][0].rotary_dim == 4


def test_a_latent_model_is_not_converted_again():
    with pytest.raises(ValueError, match="latent already .*convert the original checkpoint instead"):
        convert(convert(tiny_model("llama"), d_qk=16, preset="paper"), d_qk=8, preset="paper")


def test_another_kind_of_model_or_config_is_refused():
    llama, qwen3 = tiny_model("llama"), tiny_model("qwen3")
    with pytest.raises(ValueError, match="needs a LlamaForCausalLM: got LlamaModel; load the checkpoint"):
        convert(llama.model, d_qk=16, preset="paper")
    with pytest.raises(
        ValueError, match="made for llama with head_dim=32, qk_norm=none: got qwen3 with head_dim=32"
    ):
        convert(qwen3, choose(llama.config, 16, 16, resolve_choices("paper")))
    with pytest.raises(ValueError, match="made for llama with head_dim=32.*got llama with head_dim=16"):
        convert(tiny_model("llama", head_dim=16), choose(llama.config, 16, 16, resolve_choices("paper")))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_models_and_configs_can_be_pickled_and_copied(name):
    latent = convert(tiny_model(name), d_qk=16, preset="paper")
    x = tokens()
    for other in (pickle.loads(pickle.dumps(latent)), copy.deepcopy(latent)):
        assert_same_model(other, latent, x)
        assert type(other) is type(latent)
    assert pickle.loads(pickle.dumps(latent.config)).kv_latent == latent.config.kv_latent
    with pytest.raises(AttributeError, match="no attribute 'KVLatentNoneModel'"):
        modeling.KVLatentNoneModel  # noqa: B018


def test_widths_per_layer():
    latent = convert(tiny_model("llama"), d_qk=[16, 32, 8], d_vo=[8, 8, 32], preset="paper")
    config = latent_config_of(latent.config)
    assert (latent.config.qk_head_dim, latent.config.v_head_dim, latent.config.head_dim) == (32, 32, 32)
    assert len(config.tables) == 3 and config.tables[1][0] == effective_table(tiny_model("llama").config)
    assert latent(tokens()).logits.isfinite().all()


def test_a_config_of_a_model_with_other_layers_is_refused():
    config = latent_config_of(convert(tiny_model("llama"), d_qk=[16, 32, 8], preset="paper").config)
    shallow = tiny_model("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="a list of d_qk needs one width per layer: got 3 for 2 layers"):
        convert(shallow, config)


def test_converting_copies_only_what_it_changes():
    script = Path(__file__).parent.parent / "benchmarks" / "conversion_memory.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["model_bytes"] >= 1e9 and result["ratio"] < 1.3
