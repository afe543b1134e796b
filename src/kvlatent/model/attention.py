"""Attention whose keys live at d_qk and whose values live at d_vo.

`LatentAttention` replaces an upstream attention module instance by instance and speaks upstream's contracts: the
attention interface, the cache (which stores d_qk and d_vo unpadded), the masks. One class serves all families; at
full width it does upstream's arithmetic in upstream's order, so the result is bit-identical. Narrower, and for one
token on a CPU, it has an attention of its own in place of sdpa's.

Shapes: B batch, T query positions, S cached positions, D model width, N query heads, K key-value heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import dropout, pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of
from kvlatent.model.grouped_attention import adds_one_token, grouped_attention
from kvlatent.model.growing_cache import grow_in_place
from kvlatent.model.kernel_width import kernel_width, refuse_flex_training
from kvlatent.model.projection import Projections
from kvlatent.model.rotary import LatentRotary, apply_rotary

__all__ = ["LatentAttention"]


class LatentAttention(Projections):
    """Self-attention of one layer with key width d_qk and value width d_vo.

    The softmax scale is d_qk^-1/2, times what the original's is of head_dim^-1/2; where a preset keeps the original scale,
    the factor is folded into W_Q (or, after a QK-norm, into `q_map`).

    Args:
        config: the latent transformers config.
        latent: the parsed `config.kv_latent`.
        layer_idx: layer number, for the cache and per-layer widths.
    """

    def __init__(self, config: Any, latent: LatentConfig, layer_idx: int) -> None:
        super().__init__(config, latent, layer_idx)
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = self.d_qk
        family = family_of(config)
        self.scaling = family.scaling(config, self.d_qk, latent.original_head_dim)
        self.is_narrow = (self.d_qk, self.d_vo) != (latent.original_head_dim,) * 2
        self.attention_dropout = getattr(config, "attention_dropout", 0.0)  # not every family has it
        self.output_dropout = family.number(config, "output_dropout", 0.0)
        self.is_causal = True
        self.sliding_window = family.sliding_window(config, layer_idx)
        self.rotates = bool(family.rotary)
        self.rotary: LatentRotary | None = None
        if not latent.one_table:
            self.rotary = LatentRotary(latent.tables_at(layer_idx), in_float32=family.rotates_in_float32)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output [B, T, D] and, where the implementation gives them, the weights [B, N, T, S].

        Args:
            position_embeddings: cosines and sines, or the positions where each layer has a table of its own.
            past_key_values, layer_past: the cache, under either of upstream's names.

        Raises:
            ValueError: training with flex attention on a CPU, which has no backward there.
        """
        query, key, value, gate = self.project(hidden_states)
        if self.rotates:
            if self.rotary is not None:
                assert isinstance(position_embeddings, Tensor), "the decoder has no table"
                position_embeddings = self.rotary(hidden_states, position_embeddings)
            assert isinstance(position_embeddings, tuple), "the decoder shares one table"
            query, key = (apply_rotary(x, *position_embeddings) for x in (query, key))
        past_key_values = layer_past if past_key_values is None else past_key_values
        if past_key_values is not None:
            grow_in_place(past_key_values, self.layer_idx, key)
            key, value = past_key_values.update(key, value, self.layer_idx)

        refuse_flex_training(self.config, query)
        is_paged = kwargs.get("cache") is not None
        # vLLM's Transformers backend hangs its attention layer, which owns the cache, onto this module as `attn`.
        cache_width = getattr(getattr(self, "attn", None), "head_size", None)
        width = kernel_width(
            self.config, self.d_qk, self.d_vo, query, is_paged=is_paged, cache_width=cache_width
        )
        if width is not None:
            query, key, value = (pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation == "sdpa" and self.is_narrow and adds_one_token(query) and not is_paged:
            attend = grouped_attention
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if width is not None:  # vLLM gives the heads side by side: [T, N x width]
            output = output.reshape(*hidden_states.shape[:-1], self.num_heads, width)[..., : self.d_vo]
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        output = self.read_out(output, gate)
        return dropout(output, self.output_dropout, self.training), weights
