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
    "it has no rotary position embedding": ("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt", "xglm"),
    "it normalises queries and keys after their rotation, which the latent attention does not reproduce": (
        "hunyuan_v1_dense",
    ),
    "it scales queries by their position (llama_4_scaling_beta), which the latent attention does not reproduce": (
        "ministral3",
    ),
    "its attention and a state-space mixer read a layer's input side by side, and keys have a multiplier of their own": (
        "falcon_h1",
    ),
    "its layers have heads of two widths, its values are normalised, its last layers read the keys and values of earlier "
    "ones, and each layer reads an embedding of the tokens of its own; a row has no field for these": ("gemma4_text",),
}  # fmt: skip
"""Why architectures are refused, whatever their configuration says: the reason, and model types."""
