"""Bytes of a served model, read from its config, against counted parameters and worked numbers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from kvlatent.engines.kv_dtypes import KVDtype
from kvlatent.engines.serving_figures import serving_figures
from kvlatent.model.attention import LatentAttention
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import head_dim_of
from kvlatent.model.table import RotaryTable
from tiny import FAMILIES, SIZES

D_QK, D_VO = 12, 20


def config_of(name, **overrides):
    config_type, _, fields = FAMILIES[name]
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()}
    return config_type(**{**SIZES, **fields, **overrides})


def llama_8b(**overrides):
    """The sizes of Llama-3.1-8B, in bfloat16."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        dtype=torch.bfloat16,
        **overrides,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_the_original_by_counting(name):
    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held = sum(parameter.numel() for parameter in model.parameters())
    head_dim = head_dim_of(config)
    figures = serving_figures(config, head_dim, head_dim, element_size=1)
    assert figures.original == figures.latent
    assert figures.original.weight_bytes == held
    embeddings = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert figures.original.read_bytes == held - embeddings
    assert figures.speedup(1000, 8) == 1


@pytest.mark.parametrize("qk_norm", ["full", "sliced"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_the_latent_model_by_counting(name, qk_norm):
    config = config_of(name)
    head_dim = head_dim_of(config)
    is_normed = name.startswith("qwen3")
    latent = LatentConfig(
        d_qk=D_QK,
        d_vo=D_VO,
        tables=((RotaryTable((1.0, 0.5)),),),
        channels=((tuple(range(D_QK)),),),
        original_head_dim=head_dim,
        original_model_type=config.model_type,
        qk_norm=qk_norm if is_normed else "none",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        for layer in model.model.layers:
            layer.self_attn = LatentAttention(config, latent, 0)
    figures = serving_figures(config, D_QK, D_VO, element_size=4, qk_norm=qk_norm)
    assert figures.latent.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert figures.latent.weight_bytes != figures.original.weight_bytes
    expected = latent.cache_bytes_per_token(config.num_hidden_layers, config.num_key_value_heads, 4)
    assert figures.latent.bytes_per_token == expected


def test_llama_8b_by_hand():
    """16.06 GB of weights; each of 32 layers loses 80 of 2 x 128 channels in Q, K, V and O."""
    figures = serving_figures(llama_8b(), 64, 112)
    assert figures.original.weight_bytes == 2 * 8_030_261_248
    dropped = 32 * 4096 * ((32 + 8) * (128 - 64) + (32 + 8) * (128 - 112))
    assert figures.latent.weight_bytes == 2 * (8_030_261_248 - dropped)
    assert figures.original.bytes_per_token == 131_072
    assert figures.latent.bytes_per_token == 131_072 * 176 // 256
    read = 2 * (8_030_261_248 - 128_256 * 4096)
    cache = 8 * 32_768
    expected = (read + cache * 131_072) / (read - 2 * dropped + cache * 90_112)
    assert figures.speedup(32_768, 8) == pytest.approx(expected, rel=1e-12)
    assert figures.maximum_context(24e9)[0] == int((24e9 - 2 * 8_030_261_248) / 131_072)


def test_widths_by_layer_are_their_sum():
    config = config_of("llama")
    widths = [(8, 16), (12, 20), (32, 32)]
    mixed = serving_figures(
        config, tuple(k for k, _ in widths), [v for _, v in widths], element_size=2
    ).latent
    alone = [serving_figures(config, *pair, element_size=2).latent for pair in widths]
    assert mixed.layer_bytes == tuple(one.layer_bytes[0] for one in alone)
    assert 3 * mixed.weight_bytes == sum(one.weight_bytes for one in alone)


def test_a_quantised_cache_stacks():
    two, half = (
        serving_figures(llama_8b(), 64, 64, kv_dtype=dtype) for dtype in (None, KVDtype("four bits", 4, 4))
    )
    assert half.original == two.original
    assert half.latent.bytes_per_token == two.latent.bytes_per_token / 4
    assert half.latent.weight_bytes == two.latent.weight_bytes


def test_windows_bound_the_cache():
    config = MistralConfig(**{**SIZES, "head_dim": 32, "sliding_window": 16})
    figures = serving_figures(config, 16, 16)
    assert (
        figures.latent.cache_bytes(16)
        == figures.latent.cache_bytes(1000)
        == 16 * figures.latent.bytes_per_token
    )
    assert figures.maximum_context(1e9) == (None, None)
    with_full = serving_figures(config_of("qwen2-window"), 16, 16)
    assert with_full.latent.windows == (None, 16, 16)
    assert with_full.latent.cache_bytes(20) == (20 + 32) * with_full.latent.bytes_per_token / 3


def test_memories_too_small():
    figures = serving_figures(llama_8b(), 64, 64)
    between = (figures.latent.weight_bytes + figures.original.weight_bytes) / 2
    before, after = figures.maximum_context(between)
    assert before == 0 and after > 0
    with pytest.raises(ValueError, match=r"got 8 GB for weights of 14\.7\d GB; give a larger memory"):
        figures.maximum_context(8e9)


def test_summary_is_json():
    summary = json.loads(json.dumps(serving_figures(llama_8b(), 64, 64).summary(24e9)))
    assert summary["cache_bytes_per_token"] == {"original": 131_072, "latent": 65_536, "share": 0.5}
    assert summary["trained_context"] == 131_072
    speedups = {(row["context"], row["batch"]): row["speedup"] for row in summary["decode_speedup"]}
    assert len(speedups) == 9 and 1 < speedups[4096, 1] < speedups[32_768, 8] < speedups[131_072, 32] < 2
    assert [row["batch"] for row in summary["maximum_context"]] == [1, 8, 32]
    assert all(row["latent"] > 2 * row["original"] for row in summary["maximum_context"])
    assert "maximum_context" not in serving_figures(llama_8b(), 64, 64).summary()
