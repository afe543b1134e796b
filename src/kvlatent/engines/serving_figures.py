"""What widths are worth when a model is served: bytes per token, longest context in a memory, decoding speed by bytes.

Read from a source model's config alone; nothing is loaded and nothing is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from kvlatent.engines.kv_dtypes import KVDtype, kv_bytes_by_layer
from kvlatent.engines.roofline import attention_parameters, decode_speedup, maximum_context
from kvlatent.model.cache_bytes import cache_bytes
from kvlatent.model.families import attention_layers_of, family_of, head_dim_of, key_value_heads_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.model.widths import Width, width_per_layer

__all__ = ["BATCHES", "CONTEXTS", "Footprint", "ServingFigures", "serving_figures"]

CONTEXTS = (4096, 32_768, 131_072)
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model.

    Args:
        weight_bytes: held in memory.
        read_bytes: of the weights that one decoding step reads: all but the input embeddings, of which it looks up a
            row. (Tied ones are read as the head.)
        layer_bytes: one token of one sequence in each layer's cache.
        windows: of each layer in tokens, None for full attention.
    """

    weight_bytes: float
    read_bytes: float
    layer_bytes: tuple[float, ...]
    windows: tuple[int | None, ...]

    @property
    def bytes_per_token(self) -> float:
        """Cache bytes of one token of one sequence, as long as it is inside every window."""
        return sum(self.layer_bytes)

    def cache_bytes(self, context: int) -> float:
        """Cache bytes of one sequence at a context of so many tokens."""
        return cache_bytes(context, self.layer_bytes, self.windows)

    def cache_only(self) -> Footprint:
        """The same cache, and no weights: for a memory that is the cache's alone."""
        return replace(self, weight_bytes=0)

    def maximum_context(self, memory_bytes: float, batch: int = 1) -> int | None:
        """Longest context of `batch` sequences, in tokens, in a memory that also holds the weights.

        None when windows keep the cache from growing.

        Raises:
            ValueError: the weights alone do not fit.
        """
        return maximum_context(memory_bytes, self.weight_bytes, self.layer_bytes, self.windows, batch)


@dataclass(frozen=True)
class ServingFigures:
    """A model before and after.

    Args:
        original, latent: bytes of the two.
        trained_context: longest sequence that the original was made for, tokens; None when its config does not say.
    """

    original: Footprint
    latent: Footprint
    trained_context: int | None

    def speedup(self, context: int, batch: int = 1) -> float:
        """Decoding speed over the original's by bytes read: (W + b C) / (W' + b C')."""
        return decode_speedup(
            self.original.read_bytes,
            self.original.cache_bytes(context),
            self.latent.read_bytes,
            self.latent.cache_bytes(context),
            batch,
        )

    def maximum_context(self, memory_bytes: float, batch: int = 1) -> tuple[int | None, int | None]:
        """Longest contexts of original and latent model in a memory; 0 for an original that does not fit.

        Raises:
            ValueError: the weights of the latent model alone do not fit.
        """
        after = self.latent.maximum_context(memory_bytes, batch)
        fits = memory_bytes >= self.original.weight_bytes
        return (self.original.maximum_context(memory_bytes, batch) if fits else 0), after

    def summary(
        self,
        memory_bytes: float | None = None,
        contexts: Sequence[int] = CONTEXTS,
        batches: Sequence[int] = BATCHES,
    ) -> dict[str, Any]:
        """JSON-able: bytes per token and of weights before and after, longest contexts, speed-ups.

        "maximum_context" is there when a memory is given: by batch, in tokens, null for no limit.

        Raises:
            ValueError: the weights of the latent model alone do not fit into the memory.
        """
        document: dict[str, Any] = {
            "cache_bytes_per_token": {
                "original": self.original.bytes_per_token,
                "latent": self.latent.bytes_per_token,
                "share": self.latent.bytes_per_token / self.original.bytes_per_token,
            },
            "weight_bytes": {"original": self.original.weight_bytes, "latent": self.latent.weight_bytes},
            "trained_context": self.trained_context,
            "decode_speedup": [
                {"context": context, "batch": batch, "speedup": self.speedup(context, batch)}
                for context in contexts
                for batch in batches
            ],
        }
        if memory_bytes is not None:
            limits = {batch: self.maximum_context(memory_bytes, batch) for batch in batches}
            document["maximum_context"] = [
                {"memory_bytes": memory_bytes, "batch": batch, "original": before, "latent": after}
                for batch, (before, after) in limits.items()
            ]
        return document


def serving_figures(
    config: Any,
    d_qk: Width,
    d_vo: Width,
    *,
    element_size: float | None = None,
    kv_dtype: KVDtype | None = None,
    original_kv_dtype: KVDtype | None = None,
    qk_norm: str = "full",
) -> ServingFigures:
    """Bytes of a model before and after it gets these widths.

    Args:
        config: transformers config of the source model.
        d_qk, d_vo: widths in channels, one number or one per layer.
        element_size: bytes of one weight; left out, that of the config's dtype (4 where it names none).
        kv_dtype, original_kv_dtype: of the caches of the latent model and of the original; left out, that of the weights.
        qk_norm: for models with a QK-norm, as in `latent_config.choose`.

    Raises:
        ValueError: an architecture that is not supported.
    """
    family_of(config)
    if element_size is None:
        dtype = getattr(config, "dtype", None)
        element_size = 4 if dtype is None else dtype.itemsize
    head_dim, stored = head_dim_of(config), KVDtype("as the weights", 8 * element_size, 8 * element_size)
    return ServingFigures(
        original=_footprint(config, head_dim, head_dim, qk_norm, element_size, original_kv_dtype or stored),
        latent=_footprint(config, d_qk, d_vo, qk_norm, element_size, kv_dtype or stored),
        trained_context=getattr(config, "max_position_embeddings", None),
    )


def _footprint(
    config: Any, d_qk: Width, d_vo: Width, qk_norm: str, element_size: float, kv_dtype: KVDtype
) -> Footprint:
    numbers, heads = attention_layers_of(config), key_value_heads_of(config)
    layers = len(numbers)
    keys, values = width_per_layer(d_qk, layers), width_per_layer(d_vo, layers)
    attention = sum(_attention_size(config, k, v, qk_norm) for k, v in zip(keys, values, strict=True))
    held, read = _sizes_around_attention(config.to_json_string(use_diff=False), type(config))
    return Footprint(
        weight_bytes=(attention + held) * element_size,
        read_bytes=(attention + read) * element_size,
        layer_bytes=kv_bytes_by_layer(kv_dtype, keys, values, layers, heads),
        windows=tuple(family_of(config).sliding_window(config, layer) for layer in numbers),
    )


def _attention_size(config: Any, d_qk: int, d_vo: int, qk_norm: str) -> int:
    """Parameters of one layer's attention at these widths."""
    family, heads, kv_heads = family_of(config), config.num_attention_heads, key_value_heads_of(config)
    head_dim = head_dim_of(config)
    full = family.qk_norm and qk_norm == "full" and d_qk < head_dim
    qkv_bias, o_bias = family.biases(config)
    projections = attention_parameters(
        config.hidden_size,
        heads,
        kv_heads,
        d_qk,
        d_vo,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        projected=head_dim if full else None,
    )
    if family.gates_output:  # the gate's rows, W_O at the full width, and the map back to it
        lifted = heads * (config.hidden_size * (head_dim - d_vo) + head_dim * d_vo) if d_vo < head_dim else 0
        projections += heads * head_dim * (config.hidden_size + qkv_bias) + lifted
    norms = {"": 0, "head": 2, "all heads": heads + kv_heads}[family.qk_norm]
    return projections + norms * (head_dim if full else d_qk)


@lru_cache(maxsize=8)
def _sizes_around_attention(config_json: str, config_type: Any) -> tuple[int, int]:
    """Parameters outside the attention, of an original's config: all of them, and what a step for one sequence reads.

    A step looks up a row of the input embeddings, and reads those experts that a token goes to.
    """
    config = config_type.from_dict(json.loads(config_json))
    family = family_of(config)
    with torch.device("meta"):
        model = family.upstream("ForCausalLM")(config)
    decoder = model.get_decoder()
    attention = {
        id(parameter)
        for layer in family.attention_layers(config)
        for parameter in parts_of(decoder, layer).attention.parameters()
    }
    held = idle = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in attention:
            continue
        held += parameter.numel()
        if family.expert_parameters and name.endswith(family.expert_parameters):
            idle += parameter[0].numel() * (len(parameter) - config.num_experts_per_tok)
    if not config.tie_word_embeddings:
        idle += model.get_input_embeddings().weight.numel()
    return held, held - idle
