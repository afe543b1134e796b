"""The supported architectures, one row each, and why the others are refused.

To add a family, add its row to `family_rows` (and its name leaves `REFUSED`), give tests/tiny.py a toy of it,
and run the tests: full width must be the identity, bit for bit. Rotary channels must be half-split pairs.
"""

from __future__ import annotations

from typing import Any

from kvlatent.model.family import Family
from kvlatent.model.family_rows import FAMILIES
from kvlatent.model.refusals import INTERLEAVED, REFUSED, SINKS
from kvlatent.model.table import RotaryTable

__all__ = [
    "FAMILIES",
    "LATENT_PREFIX",
    "attention_layers_of",
    "effective_table",
    "effective_tables",
    "family_of",
    "family_of_original",
    "head_dim_of",
    "key_value_heads_of",
    "logit_divisor_of",
    "rope_theta_of",
]

LATENT_PREFIX = "kv_latent_"

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
    if getattr(config, "attention_sinks", None):
        return f"{SINKS}; {supported}"
    if getattr(config, "kv_lora_rank", None):
        return f"its cache is already latent (multi-head latent attention); {supported}"
    if getattr(config, "rope_interleave", False):
        return f"{INTERLEAVED}; {supported}"
    if reason := next((reason for reason, types in REFUSED.items() if model_type in types), None):
        return f"{reason}; {supported}"
    inner = str(getattr(getattr(config, "text_config", None), "model_type", ""))
    if inner in FAMILIES:
        return (
            f"it holds a language model of type {inner!r} beside other parts; of what transformers' AutoModelForImageTextToText "
            "loads, the directory is converted whole; of any other, load the language model alone with AutoModelForCausalLM, save it, "
            "and convert what was saved"
        )
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
    family = FAMILIES[model_type]
    if refused := next((reason for field, reason in family.refused if getattr(config, field, None)), None):
        return refused
    rope = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in rope.values()):
        return _rope_obstacle(rope)
    if not family.tables_by_layer_type:
        return "it has one rotary table per layer type; one table for all layers is supported"
    return next(filter(None, (_rope_obstacle(value) for value in rope.values() if value)), None)


def _rope_obstacle(rope: dict[str, Any]) -> str | None:
    rope_type = rope.get("rope_type", "default")
    if rope_type == "dynamic":
        return "rope_type 'dynamic' recomputes its frequencies at every length, so no table can be stored; use yarn"
    if rope_type not in _ROPE_TYPES:
        return f"rope_type {rope_type!r} is not supported; supported are {', '.join(_ROPE_TYPES)}"
    return None


def head_dim_of(config: Any) -> int:
    """Original head width of a source model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads_of(config: Any) -> int:
    """Heads of keys and values, in a config that may not tell them from those of queries."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attention_layers_of(config: Any) -> tuple[int, ...]:
    """Numbers of the layers that have attention, of an original or latent config."""
    return family_of(config).attention_layers(config)


def logit_divisor_of(config: Any) -> float:
    """What logits are divided by behind the head; 1 for models of families without a row as well."""
    family = FAMILIES.get(str(getattr(config, "model_type", "")).removeprefix(LATENT_PREFIX))
    return 1.0 if family is None else family.number(config, "logit_divisor")


def rope_theta_of(config: Any, layer: int = 0) -> float:
    """Base of the rotary frequencies of a layer of a source model."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return 1.0  # nothing is rotated
    return float((rope if "rope_theta" in rope else rope[config.layer_types[layer]])["rope_theta"])


def effective_table(config: Any, layer: int | None = None) -> RotaryTable:
    """The rotary table that a layer with attention turns its keys by in the original, or the first of them; see `effective_tables`."""
    tables = effective_tables(config)
    if layer is None or len(tables) == 1:
        return tables[0]
    return tables[attention_layers_of(config).index(layer)]


def effective_tables(config: Any) -> tuple[RotaryTable, ...]:
    """One table for all layers, or one a layer with attention, as the original model turns its keys (fp32 values, radians).

    After all scaling, read from upstream's own rotary module, never recomputed from a base: llama3, linear, yarn, longrope
    and partial rotary are included. longrope gives both of its tables and the length at which they switch. The table of a
    layer without rotation is empty.
    """
    family = family_of(config)
    if not family.rotary:
        return (RotaryTable(()),)
    layers = family.attention_layers(config)
    kinds: list[str | None] = [""] * len(layers)
    if family.tables_by_layer_type:
        kinds = [config.layer_types[layer] for layer in layers]
    if family.rotates:
        kinds = [
            kind if turns else None
            for kind, turns in zip(
                kinds, (family.setting(config, family.rotates)[layer] for layer in layers), strict=True
            )
        ]
    rotary = family.upstream("RotaryEmbedding")(config)
    tables = {
        kind: RotaryTable(()) if kind is None else _table_of(rotary, kind, config)
        for kind in dict.fromkeys(kinds)
    }
    if len(set(tables.values())) == 1:
        return (tables[kinds[0]],)
    return tuple(tables[kind] for kind in kinds)


def _table_of(rotary: Any, layer_type: str, config: Any) -> RotaryTable:
    """What upstream's rotary module turns layers of a type by; of the only type where there is one."""
    prefix = f"{layer_type}_" if layer_type else ""
    short = tuple(getattr(rotary, f"{prefix}inv_freq").tolist())
    factor = float(getattr(rotary, f"{prefix}attention_scaling"))
    rope_type = rotary.rope_type[layer_type] if layer_type else rotary.rope_type
    if rope_type != "longrope":
        return RotaryTable(short, attention_factor=factor)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    switch = int(config.rope_parameters["original_max_position_embeddings"])
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=switch + 1)
    return RotaryTable(short, tuple(long.tolist()), switch, factor)
