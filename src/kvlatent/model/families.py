"""The supported architectures, one row each, and why the others are refused.

To add a family, add its row to `FAMILIES` (and its name leaves the lists below it), give tests/tiny.py a toy of it,
and run the tests: full width must be the identity, bit for bit. A row says what differs between decoders whose layers
are x + attention(norm(x)), then x + ffn(norm(x)), with rotary channels in half-split pairs; anything else (sandwich
norms, scaled residuals, interleaved pairs) needs code and not a row.

Upstream facts that this table relies on (transformers 5.23): the modules `model.layers[i].self_attn` with `q_proj`,
`k_proj`, `v_proj`, `o_proj` (Phi-3: `qkv_proj`, `o_proj`), `q_norm` and `k_norm` on Qwen3, the rotary modules'
`inv_freq` and `attention_scaling`, and `ROPE_INIT_FUNCTIONS["longrope"]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from kvlatent.model.table import RotaryTable

__all__ = [
    "FAMILIES",
    "Family",
    "LayerParts",
    "effective_table",
    "family_of",
    "family_of_original",
    "head_dim_of",
    "parts_of",
]

LATENT_PREFIX = "kv_latent_"


@dataclass(frozen=True)
class Family:
    """One architecture: where its attention keeps its parts.

    Args:
        model_type: of the source model, as transformers spells it.
        prefix: of its class names (`Llama` in `LlamaForCausalLM`).
        qkv_bias, o_bias: whether the projections have biases: "never", "always", or as the config says in
            "attention_bias".
        fused_qkv: q, k and v live in one `qkv_proj`.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        windowed: "never", "always" (when `config.sliding_window` is set) or "by layer type".
        attention, attention_norm, ffn, ffn_norm: names of a layer's modules; a norm comes before what it is named for.
        ffn_modules: linear layers of the FFN, the targets of LoRA.
    """

    model_type: str
    prefix: str
    qkv_bias: str = "never"
    o_bias: str = "never"
    fused_qkv: bool = False
    qk_norm: bool = False
    windowed: str = "never"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    ffn_modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    @property
    def attention_modules(self) -> tuple[str, ...]:
        """Names of the linear layers of its attention."""
        return ("qkv_proj", "o_proj") if self.fused_qkv else ("q_proj", "k_proj", "v_proj", "o_proj")

    def upstream(self, suffix: str) -> Any:
        """transformers' class of this family, e.g. `upstream("ForCausalLM")`."""
        module = "configuration" if suffix == "Config" else "modeling"
        path = f"transformers.models.{self.model_type}.{module}_{self.model_type}"
        return getattr(import_module(path), self.prefix + suffix)

    def biases(self, config: Any) -> tuple[bool, bool]:
        """Whether (q, k, v) and o have biases."""
        as_configured = bool(getattr(config, "attention_bias", False))
        answers = {"never": False, "always": True, "attention_bias": as_configured}
        return answers[self.qkv_bias], answers[self.o_bias]

    def sliding_window(self, config: Any, layer: int) -> int | None:
        """Window of `layer` in tokens, or None for full attention."""
        if self.windowed == "never":
            return None
        if self.windowed == "by layer type" and config.layer_types[layer] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)


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
            qk_norm=True,
            windowed="by layer type",
        ),
        Family("phi3", "Phi3", fused_qkv=True, windowed="always", ffn_modules=("gate_up_proj", "down_proj")),
    )
}

_INTERLEAVED = (
    "chatglm", "codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium", "llama4_text", "llama4",
)  # fmt: skip
_NO_ROTARY = ("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt", "xglm")
_SINKS = ("gpt_oss", "mimo_v2_flash")
_ROPE_TYPES = ("default", "linear", "llama3", "longrope", "yarn")


def family_of(config: Any) -> Family:
    """The row for a transformers config, original or latent.

    Raises:
        ValueError: the architecture, or something in its configuration, is not supported; the sentence names what is
            in the way.
    """
    model_type = str(getattr(config, "model_type", "")).removeprefix(LATENT_PREFIX)
    obstacle = _obstacle(config, model_type)
    if obstacle is not None:
        raise ValueError(f"cannot convert a model of type {model_type!r}: {obstacle}")
    return FAMILIES[model_type]


def family_of_original(config: Any) -> Family:
    """As `family_of`, of a model that is not latent yet.

    Raises:
        ValueError: as `family_of`; or the model is latent.
    """
    family = family_of(config)
    if str(config.model_type).startswith(LATENT_PREFIX):
        raise ValueError(
            f"the model is latent already (model_type {config.model_type!r}); convert the original checkpoint instead"
        )
    return family


def _obstacle(config: Any, model_type: str) -> str | None:
    """What stands in the way of converting a model with this config, or None."""
    supported = f"supported are {', '.join(FAMILIES)}"
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder-decoder, not a decoder-only language model; {supported}"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attn_logit_softcap", None):
        return f"its attention logits are soft-capped, which the latent attention does not reproduce; {supported}"
    if model_type in _SINKS or getattr(config, "attention_sinks", None):
        return f"its heads have attention sinks, which the latent attention does not reproduce; {supported}"
    if getattr(config, "kv_lora_rank", None):
        return f"its cache is already latent (multi-head latent attention); {supported}"
    if model_type in _INTERLEAVED or getattr(config, "rope_interleave", False):
        return (
            f"its rotary layout is interleaved (pairs 2j, 2j+1), not half-split (pairs j, j+d/2); {supported}"
        )
    if model_type in _NO_ROTARY:
        return f"it has no rotary position embedding; {supported}"
    if model_type not in FAMILIES:
        causal = any(
            str(name).endswith("ForCausalLM") for name in getattr(config, "architectures", None) or ()
        )
        kind = (
            "its architecture is not among the tested ones" if causal else "it is not a causal language model"
        )
        return f"{kind}; {supported}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised; convert the unquantised checkpoint and quantise the result"
    return _rope_obstacle(getattr(config, "rope_parameters", None) or {})


def _rope_obstacle(rope: dict[str, Any]) -> str | None:
    if any(isinstance(value, dict) for value in rope.values()):
        return "it has one rotary table per layer type; one table for all layers is supported"
    rope_type = rope.get("rope_type", "default")
    if rope_type == "dynamic":
        return "rope_type 'dynamic' recomputes its frequencies at every length, so no table can be stored; use yarn"
    if rope_type not in _ROPE_TYPES:
        return f"rope_type {rope_type!r} is not supported; supported are {', '.join(_ROPE_TYPES)}"
    return None


class LayerParts(NamedTuple):
    """Modules of one layer, whatever its family calls them."""

    attention: Any
    attention_norm: Any
    ffn: Any
    ffn_norm: Any


def parts_of(decoder: Any, layer: int) -> LayerParts:
    """The modules of a layer of a decoder, original or latent."""
    family = family_of(decoder.config)
    return LayerParts(*(getattr(decoder.layers[layer], getattr(family, name)) for name in LayerParts._fields))


def head_dim_of(config: Any) -> int:
    """Original head width of a source model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def effective_table(config: Any) -> RotaryTable:
    """The rotary table that the original model turns its keys by, after all scaling (fp32 values, radians).

    Read from upstream's own rotary module, never recomputed from a base: llama3, linear, yarn, longrope and partial
    rotary are included. longrope gives both of its tables and the length at which they switch.
    """
    family = family_of(config)
    rotary = family.upstream("RotaryEmbedding")(config)
    short = tuple(rotary.inv_freq.tolist())
    factor = float(rotary.attention_scaling)
    if rotary.rope_type != "longrope":
        return RotaryTable(short, attention_factor=factor)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    switch = int(config.rope_parameters["original_max_position_embeddings"])
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=switch + 1)
    return RotaryTable(short, tuple(long.tolist()), switch, factor)
