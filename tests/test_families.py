import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from calibration_setup import text
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.model.assembly import full_width
from kvlatent.model.families import FAMILIES as FAMILY_ROWS
from kvlatent.model.families import effective_table, family_of
from kvlatent.model.family import Family
from kvlatent.model.layer_parts import layer_output, parts_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.training.trainable import trainable_names
from tiny import FAMILIES, HEAD_DIM, LLAMA3_ROPE, SIZES, SWITCH, logits, tiny_model, tokens
from tolerances import assert_same_model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_effective_table_is_what_the_model_turns_its_keys_by(name):
    model = tiny_model(name)
    table = effective_table(model.config)
    assert torch.equal(torch.tensor(table.short), model.model.rotary_emb.inv_freq)
    assert table.attention_factor == model.model.rotary_emb.attention_scaling
    if name == "phi3-longrope":
        model.model.rotary_emb(
            torch.zeros(1), torch.tensor([[SWITCH]])
        )  # upstream switches to the long table
        assert torch.equal(torch.tensor(table.long), model.model.rotary_emb.inv_freq)
        assert table.switch == SWITCH and table.rotary_dim == HEAD_DIM // 2 and table.attention_factor > 1


def llama(**changes):
    return LlamaConfig(architectures=["LlamaForCausalLM"], **changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "'t5': it is an encoder-decoder"),
        (
            BertConfig(architectures=["BertForMaskedLM"]),
            "'bert': it is not a causal language model; supported are llama",
        ),
        (Gemma2Config(), "'gemma2': its attention logits are soft-capped"),
        (DeepseekV3Config(), "'deepseek_v3': its cache is already latent"),
        (CohereConfig(), "'cohere': its rotary layout is interleaved"),
        (GPT2Config(), "'gpt2': it has no rotary position embedding"),
        (AutoConfig.for_model("gpt_oss"), "'gpt_oss': its heads have attention sinks"),
        (
            AutoConfig.for_model("apertus", architectures=["ApertusForCausalLM"]),
            "'apertus': its architecture is not among the tested",
        ),
        (
            AutoConfig.for_model("hunyuan_v1_dense"),
            "'hunyuan_v1_dense': it normalises .* after their rotation",
        ),
        (AutoConfig.for_model("ministral3"), "'ministral3': it scales queries by their position"),
        (
            AutoConfig.for_model("stablelm", qk_layernorm=True),
            "'stablelm': its queries .* a LayerNorm of each head's own",
        ),
        (
            llama(quantization_config={"quant_method": "fp8"}),
            "its weights are quantised; convert the unquantised",
        ),
        (
            llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "'dynamic' recomputes",
        ),
        (
            llama(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
            "'proportional' is not supported",
        ),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        family_of(config)


def test_a_table_per_layer_type_is_refused():
    config = llama()
    config.rope_parameters = {"full_attention": dict(LLAMA3_ROPE)}
    with pytest.raises(ValueError, match="one rotary table per layer type"):
        family_of(config)


def test_every_family_names_its_parts():
    for name in FAMILIES:
        model = tiny_model(name)
        family, layer = family_of(model.config), model.model.layers[0]
        assert all(hasattr(layer.self_attn, module) for module in family.attention_modules)
        assert all(hasattr(layer.mlp, module) for module in family.ffn_modules)
        biases = [
            hasattr(layer.self_attn, m) and getattr(layer.self_attn, m).bias is not None
            for m in ("q_proj", "o_proj")
        ]
        assert family.biases(model.config) == tuple(biases)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_is_what_the_row_says(name):
    """What its attention makes of what its norm gives, and upstream's own code around it."""
    decoder = tiny_model(name).get_decoder()
    x = torch.randn(1, 6, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = decoder.rotary_emb(x, torch.arange(6)[None])
    parts = parts_of(decoder, 1)
    with torch.no_grad():
        normed = parts.attention_norm(x)
        attended = parts.attention(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]
        expected = decoder.layers[1](x, position_embeddings=rotary, attention_mask=None)
    torch.testing.assert_close(layer_output(decoder, 1, x, attended), expected, rtol=0, atol=0)
    assert (layer_output(decoder, 1, x, 2 * attended) - expected).abs().max() > 1e-3


NEW_ROWS = {
    "apertus": Family(
        *("apertus", "Apertus"),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        attention_norm="attention_layernorm",
        ffn_modules=("up_proj", "down_proj"),
    ),
}


@pytest.mark.parametrize("name", NEW_ROWS)
def test_a_new_family_is_one_row(name, monkeypatch, tmp_path):
    """Converted by text, saved and loaded."""
    monkeypatch.setitem(FAMILY_ROWS, name, NEW_ROWS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, head_dim=HEAD_DIM)).eval()
    x = tokens()
    torch.testing.assert_close(logits(full_width(model), x), logits(model, x), rtol=0, atol=0)
    statistics = calibrate(model, text(blocks=16))
    latent = convert(model, d_qk=16, d_vo=8, align=2, statistics=statistics)
    assert (logits(latent, x) - logits(model, x)).abs().max() > 1e-3
    save(latent, tmp_path / "latent")
    assert_same_model(load_model(tmp_path / "latent"), latent, x)
    assert {n.split(".")[-2] for n in trainable_names(latent)} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
