import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)

from kvlatent.model.families import effective_table, family_of
from tiny import FAMILIES, HEAD_DIM, LLAMA3_ROPE, SWITCH, tiny_model


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
            MixtralConfig(architectures=["MixtralForCausalLM"]),
            "'mixtral': its architecture is not among the tested",
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
