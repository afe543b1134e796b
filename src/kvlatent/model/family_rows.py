"""The rows of the supported architectures; `families` says how to add one, and why others are refused.

Upstream facts that this table relies on (transformers 5.23): the modules that the rows name, in the decoder's `layers`;
layers that take `hidden_states` and call the attention with `hidden_states`, `position_embeddings`, `attention_mask` and
`past_key_values` (`layer_past`); the rotary modules' `inv_freq` and `attention_scaling`, after the layer type where there is
one a type; and `ROPE_INIT_FUNCTIONS["longrope"]`.
"""

from __future__ import annotations

from typing import Any

from kvlatent.model.family import Family

__all__ = ["FAMILIES"]

_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
_NORM_A_HEAD = (
    "its queries and keys pass a LayerNorm of each head's own, which the latent attention does not reproduce"
)
_TEXT_CLASSES = ("Config", "Model", "RotaryEmbedding")
_QWEN_HYBRID: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "qk_norm": "head",
    "attention_layer_type": "full_attention",
    "gates_output": True,
    "norm_offset": 1.0,
    "besides": "layers of linear attention and an output gate",
}
"""Linear attention in most layers, gated attention with partial rotary in the others."""
_SHORT_CONVOLUTIONS: dict[str, Any] = {
    "qk_norm": "head",
    "norm_epsilon": "norm_eps",
    "attention_layer_type": "full_attention",
    "attention_norm": "operator_norm",
    "ffn": "feed_forward",
    "final_norm": "embedding_norm",
    "attention_names": (("out_proj", "o_proj"), ("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")),
    "ffn_modules": ("w1", "w2", "w3"),
    "besides": "layers of short convolutions",
}
"""Short convolutions in most layers, attention in the others."""

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", qkv_bias="attention_bias", o_bias="attention_bias"),
        Family("mistral", "Mistral", windowed="always"),
        Family("qwen2", "Qwen2", qkv_bias="always", windowed="by layer type"),
        Family(
            "qwen3",
            "Qwen3",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            windowed="by layer type",
        ),
        Family(
            "qwen3_moe",
            "Qwen3Moe",
            besides="experts",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            windowed="always",
            expert_parameters=_EXPERTS,
        ),
        Family(
            "mixtral",
            "Mixtral",
            besides="experts",
            windowed="always",
            ffn_modules=(),
            expert_parameters=_EXPERTS,
        ),
        Family(
            "smollm3",
            "SmolLM3",
            besides="layers without rotation",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windowed="by layer type",
            rotates="no_rope_layers",
        ),
        Family(
            "olmo2",
            "Olmo2",
            besides="norms over all heads and behind its blocks",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="all heads",
            rotates_in_float32=True,
            attention_norm="",
            norms_output=True,
        ),
        Family(
            "olmo3",
            "Olmo3",
            besides="norms over all heads and behind its blocks",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="all heads",
            windowed="by layer type",
            tables_by_layer_type=True,
            rotates_in_float32=True,
            attention_norm="",
            norms_output=True,
        ),
        Family(
            "granite",
            "Granite",
            besides="multipliers",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            softmax_scale="attention_multiplier",
            residual_multiplier="residual_multiplier",
            embedding_multiplier="embedding_multiplier",
            logit_divisor="logits_scaling",
        ),
        Family("ministral", "Ministral", windowed="by layer type"),
        Family(
            "starcoder2",
            "Starcoder2",
            besides="LayerNorms and an ungated FFN",
            qkv_bias="use_bias",
            o_bias="use_bias",
            windowed="always",
            output_dropout="residual_dropout",
            ffn_modules=("c_fc", "c_proj"),
        ),
        Family(
            "stablelm",
            "StableLm",
            qkv_bias="use_qkv_bias",
            refused=(("qk_layernorm", _NORM_A_HEAD),),
            besides="LayerNorms",
        ),
        Family(
            "seed_oss",
            "SeedOss",
            qkv_bias="attention_bias",
            o_bias="attention_out_bias",
            output_dropout="residual_dropout",
        ),
        Family(
            "arcee",
            "Arcee",
            besides="an ungated FFN",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            ffn_modules=("up_proj", "down_proj"),
        ),
        Family(
            "gpt_neox",
            "GPTNeoX",
            besides="LayerNorms and an ungated FFN",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            fused_qkv="by head",
            attention="attention",
            final_norm="final_layer_norm",
            attention_names=(("query_key_value", "qkv_proj"), ("dense", "o_proj")),
            ffn_modules=("dense_h_to_4h", "dense_4h_to_h"),
        ),
        Family(
            "phi3",
            "Phi3",
            fused_qkv="stacked",
            windowed="always",
            ffn_modules=("gate_up_proj", "down_proj"),
        ),
        Family(
            "gemma3_text",
            "Gemma3",
            package="gemma3",
            text_classes=("Config", "Model"),
            besides="norms behind its blocks and scaled embeddings",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="head",
            windowed="by layer type",
            tables_by_layer_type=True,
            query_scalar="query_pre_attn_scalar",
            norms_output=True,
            norm_offset=1.0,
            refused=(
                ("final_logit_softcapping", "its logits are soft-capped behind the head"),
                (
                    "use_bidirectional_attention",
                    "its tokens see those behind them, so it has no causal cache",
                ),
            ),
        ),
        Family("lfm2", "Lfm2", **_SHORT_CONVOLUTIONS),
        Family("lfm2_moe", "Lfm2Moe", expert_parameters=_EXPERTS, rotary="pos_emb", **_SHORT_CONVOLUTIONS),
        Family(
            "jamba",
            "Jamba",
            besides="layers of state-space mixers, experts and no rotation",
            rotary="",
            attention_layer_type="full_attention",
            ffn="feed_forward",
            final_norm="final_layernorm",
            expert_parameters=_EXPERTS,
        ),
        Family("qwen3_next", "Qwen3Next", expert_parameters=_EXPERTS, **_QWEN_HYBRID),
        Family(
            "qwen3_5_text",
            "Qwen3_5",
            package="qwen3_5",
            text_classes=_TEXT_CLASSES,
            position_axes=3,
            **_QWEN_HYBRID,
        ),
        Family(
            "qwen3_5_moe_text",
            "Qwen3_5Moe",
            package="qwen3_5_moe",
            position_axes=3,
            text_classes=_TEXT_CLASSES,
            expert_parameters=_EXPERTS,
            **_QWEN_HYBRID,
        ),
    )
}
