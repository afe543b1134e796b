"""Tiny random models of every supported family, with norms and biases away from 1 and 0.

Neutral norms and biases hide ordering and omission bugs (a QK-norm after the rotation looks right while its weight
is 1), and attention of a default-initialised toy is nearly uniform; so both are perturbed.
"""

import torch
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

VOCAB = 128
SWITCH = 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
    "original_max_position_embeddings": SWITCH,
    "factor": 8.0,
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "attention_bias": True}),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "num_key_value_heads": 4}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "rope_parameters": YARN_ROPE}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 32, "sliding_window": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"hidden_size": 128}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"hidden_size": 128}),
    "phi3-longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {"hidden_size": 128, "rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH},
    ),
}
WINDOWED = {
    "sliding_window": 16,
    "use_sliding_window": True,
    "layer_types": ["full_attention", *["sliding_attention"] * 2],
}
FAMILIES["qwen2-window"] = (Qwen2Config, Qwen2ForCausalLM, {"hidden_size": 128, **WINDOWED})
FAMILIES["qwen3-window"] = (
    Qwen3Config,
    Qwen3ForCausalLM,
    {"head_dim": 32, "attention_bias": True, **WINDOWED},
)
FAMILIES["phi3-window"] = (Phi3Config, Phi3ForCausalLM, {"hidden_size": 128, "sliding_window": 16})
HEAD_DIM = 32
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 32}
OLMO3_ROPE = {
    "full_attention": YARN_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GRANITE = {
    "attention_multiplier": 0.11,
    "residual_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
}
# Run by `test_more_families.py`, once each, instead of by every cross product.
MORE_FAMILIES = {
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {**EXPERTS, "num_local_experts": 4, "sliding_window": 16}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"hidden_size": 128, "no_rope_layers": [1, 0, 1]}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"hidden_size": 128, "num_key_value_heads": 4}),
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {"hidden_size": 128, **WINDOWED, "rope_parameters": OLMO3_ROPE},
    ),
    "granite": (GraniteConfig, GraniteForCausalLM, {"hidden_size": 128, **GRANITE}),
    "ministral": (MinistralConfig, MinistralForCausalLM, {"head_dim": 32, **WINDOWED}),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM, {"hidden_size": 128, "sliding_window": 16}),
    "stablelm": (StableLmConfig, StableLmForCausalLM, {"hidden_size": 128, "use_qkv_bias": True}),
    "stablelm-parallel": (
        StableLmConfig,
        StableLmForCausalLM,
        {"hidden_size": 128, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "seed-oss": (SeedOssConfig, SeedOssForCausalLM, {"head_dim": 32, "attention_out_bias": True}),
    "arcee": (ArceeConfig, ArceeForCausalLM, {"head_dim": 32}),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"hidden_size": 128, "num_key_value_heads": None}),
    "gpt-neox-sequential": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {
            "hidden_size": 128,
            "num_key_value_heads": None,
            "use_parallel_residual": False,
            "rotary_pct": 0.5,
            "attention_bias": False,
        },
    ),
}
SHORT = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention"] * 2,
    "block_auto_adjust_ff_dim": False,
}
LINEAR = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
LINEAR_EXPERTS = {
    **LINEAR,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MORE_FAMILIES |= {
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
CONVOLUTIONS = {
    "lfm2": (Lfm2Config, Lfm2ForCausalLM, SHORT),
    "lfm2-moe": (
        Lfm2MoeConfig,
        Lfm2MoeForCausalLM,
        {
            **SHORT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
    ),
}
"""Layers 1 and 3 of four have attention, the others convolve three tokens."""
MIXERS = {
    "jamba": (
        JambaConfig,
        JambaForCausalLM,
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
        },
    ),
}
"""As `CONVOLUTIONS`, with state-space mixers; nothing is rotated."""
MORE_FAMILIES |= CONVOLUTIONS | MIXERS
HYBRIDS = {
    "qwen3-next": (Qwen3NextConfig, Qwen3NextForCausalLM, LINEAR_EXPERTS),
    "qwen3.5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, LINEAR | {"attention_bias": True}),
    "qwen3.5-moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, LINEAR_EXPERTS),
}
"""Layers 1 and 3 of four have attention, of heads of 32 channels of which 8 rotate."""
MORE_FAMILIES |= HYBRIDS


def tiny_model(name: str, **overrides):
    """A perturbed random model of one entry of `FAMILIES` or `MORE_FAMILIES`, in eval mode, fp32."""
    config_type, model_type, fields = (FAMILIES | MORE_FAMILIES)[name]
    # Copied: transformers writes into the rope dict it is given.
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()}
    torch.manual_seed(0)
    model = model_type(config_type(**{**SIZES, **fields, **overrides})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
        for buffer_name, buffer in model.named_buffers():
            if "bias" in buffer_name:
                buffer.add_(0.3 * torch.randn_like(buffer))
    return model


def tokens(batch: int = 2, length: int = 48, seed: int = 0) -> torch.Tensor:
    """Random ordinary token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def logits(model, input_ids, **kwargs) -> torch.Tensor:
    """Logits [B, T, V] without gradient."""
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def padded(x, extra=5):
    """Left-padded ids and their attention mask."""
    pad = torch.zeros(x.shape[0], extra, dtype=torch.long)
    return torch.cat([pad, x], 1), torch.cat([pad, torch.ones_like(x)], 1)
