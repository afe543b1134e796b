"""Architectures that are refused, and why, whatever their configuration says.

A reason names what is in the way, so that who wants the architecture knows what code it needs.
"""

from __future__ import annotations

__all__ = ["INTERLEAVED", "REFUSED", "SINKS"]

SINKS = "its heads have attention sinks, which the latent attention does not reproduce"
INTERLEAVED = "its rotary layout is interleaved (pairs 2j, 2j+1), not half-split (pairs j, j+d/2)"
REFUSED = {
    SINKS: ("gpt_oss", "mimo_v2_flash"),
    INTERLEAVED: (
        "chatglm", "codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium", "llama4_text", "llama4",
    ),
    "it has no rotary position embedding": ("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "jamba", "mpt", "opt", "xglm"),
    "it normalises queries and keys after their rotation, which the latent attention does not reproduce": (
        "hunyuan_v1_dense",
    ),
    "it scales queries by their position (llama_4_scaling_beta), which the latent attention does not reproduce": (
        "ministral3",
    ),
    "its attention and a state-space mixer read a layer's input side by side, and keys have a multiplier of their own": (
        "falcon_h1",
    ),
    "it scales its logits by query_pre_attn_scalar and its embeddings inside their module, for which a row has no field": (
        "gemma3_text", "gemma4_text",
    ),
    "its layers of short convolutions keep states under names that no row was tried with": ("lfm2", "lfm2_moe"),
}  # fmt: skip
"""Why architectures are refused, whatever their configuration says: the reason, and model types."""
