"""Attention whose keys live at d_qk and whose values live at d_vo.

`LatentAttention` replaces an upstream attention module instance by instance and speaks upstream's contracts: the
attention interface, the cache (which stores d_qk and d_vo unpadded), the masks. One class serves all families; at
full width it does upstream's arithmetic in upstream's order, so the result is bit-identical.

Shapes: B batch, T query positions, S cached positions, D model width, N query heads, K key-value heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of
from kvlatent.model.rotary import LatentRotary, apply_rotary

__all__ = ["KeptChannels", "LatentAttention"]


class KeptChannels(nn.Module):
    """Gathers the kept channels of each head after a full-width QK-norm; owns no parameter and no buffer.

    Args:
        channels: one list of original channels for all heads, or one per key-value head.
    """

    def __init__(self, channels: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.channels = channels
        self._on_device: dict[torch.device, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, head_dim] -> [B, T, H, d_qk]; H is N or K, each list serving the heads of its group."""
        if x.device not in self._on_device:
            self._on_device[x.device] = torch.tensor(self.channels, device=x.device)
        index = self._on_device[x.device]
        if len(self.channels) == 1:
            return x[..., index[0].clone()]  # saved for backward, which a tensor of inference mode cannot be
        index = index.repeat_interleave(x.shape[2] // len(self.channels), dim=0)  # a new tensor, too
        return x.gather(-1, index.expand(*x.shape[:2], *index.shape))


class LatentAttention(nn.Module):
    """Self-attention of one layer with key width d_qk and value width d_vo.

    The softmax scale is always d_qk^-1/2; where a preset keeps the original scale, the factor is folded into W_Q
    (or, after a QK-norm, into `q_map`, [N, d_qk, head_dim], which takes the normalised queries to the kept channels;
    queries are not cached, so it is free of any constraint).

    Args:
        config: the latent transformers config.
        latent: the parsed `config.kv_latent`.
        layer_idx: layer number, for the cache and per-layer widths.
    """

    def __init__(self, config: Any, latent: LatentConfig, layer_idx: int) -> None:
        super().__init__()
        family = family_of(config)
        self.config = config
        self.layer_idx = layer_idx
        self.d_qk = latent.d_qk_at(layer_idx)
        self.d_vo = latent.d_vo_at(layer_idx)
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = self.d_qk
        self.scaling = self.d_qk**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = family.sliding_window(config, layer_idx)

        # With a QK-norm at full width, queries and keys are projected in full and only then cut down to d_qk.
        gathers = latent.qk_norm == "full" and self.d_qk < latent.original_head_dim
        projected = latent.original_head_dim if gathers else self.d_qk
        self.widths = (
            self.num_heads * projected,
            self.num_key_value_heads * projected,
            self.num_key_value_heads * self.d_vo,
        )
        qkv_bias, o_bias = family.biases(config)
        hidden = config.hidden_size
        if family.fused_qkv:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, self.widths[0], bias=qkv_bias)
            self.k_proj = nn.Linear(hidden, self.widths[1], bias=qkv_bias)
            self.v_proj = nn.Linear(hidden, self.widths[2], bias=qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * self.d_vo, hidden, bias=o_bias)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.kept: KeptChannels | None = None
        self.q_map: nn.Parameter | None = None
        if family.qk_norm:
            norm = family.upstream("RMSNorm")
            self.q_norm = norm(projected, eps=config.rms_norm_eps)
            self.k_norm = norm(projected, eps=config.rms_norm_eps)
        if gathers:
            self.kept = KeptChannels(latent.channels_at(layer_idx))
            self.q_map = nn.Parameter(torch.empty(self.num_heads, self.d_qk, projected))
        self.rotary = None if latent.one_table else LatentRotary(latent.tables_at(layer_idx))

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, T, d_qk], keys [B, K, T, d_qk] before the rotation, and values [B, K, T, d_vo]."""
        heads = (*hidden_states.shape[:-1], -1)
        if hasattr(self, "qkv_proj"):
            query, key, value = self.qkv_proj(hidden_states).split(self.widths, dim=-1)
        else:
            query, key, value = (
                self.q_proj(hidden_states),
                self.k_proj(hidden_states),
                self.v_proj(hidden_states),
            )
        query = query.view(*heads, self.widths[0] // self.num_heads)
        key = key.view(*heads, self.widths[1] // self.num_key_value_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.kept is not None and self.q_map is not None:
            query = torch.einsum("btnh,nqh->btnq", query, self.q_map.to(query.dtype))
            key = self.kept(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.view(*heads, self.d_vo).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output [B, T, D] and, where the implementation gives them, the weights [B, N, T, S].

        Raises:
            ValueError: training with flex attention on a CPU, which has no backward there.
        """
        query, key, value = self.project(hidden_states)
        if self.rotary is not None:
            position_embeddings = self.rotary(hidden_states, kwargs["position_ids"])
        assert position_embeddings is not None, "the decoder shares one table"
        cos, sin = position_embeddings
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        self._refuse_flex_training(query)
        width = self._kernel_width(query, kwargs)
        if width is not None:
            query, key, value = (pad(x, (0, width - x.shape[-1])) for x in (query, key, value))

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
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
        if width is not None:
            attn_output = attn_output[..., : self.d_vo]
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(attn_output), attn_weights

    def _kernel_width(self, query: Tensor, kwargs: dict[str, Any]) -> int | None:
        """Common width to zero-pad queries, keys and values to for this call, or None.

        Zero channels change neither scores nor kept outputs. Needed by paged caches (one head size for the model),
        by flash attention, and by torch's fused CPU kernel: without it, prefill on a CPU falls to the math path,
        which holds all scores and ran 4x slower at 2,048 tokens. Decoding and the cache stay unpadded.
        """
        if kwargs.get("cache") is not None:
            return self.config.head_dim
        if self.d_qk == self.d_vo:
            return None
        implementation = self.config._attn_implementation
        on_cpu = implementation == "sdpa" and query.device.type == "cpu" and query.shape[2] > 1
        return max(self.d_qk, self.d_vo) if on_cpu or "flash" in implementation else None

    def _refuse_flex_training(self, query: Tensor) -> None:
        if self.config._attn_implementation != "flex_attention" or query.device.type != "cpu":
            return
        if torch.is_grad_enabled() and query.requires_grad:
            raise ValueError(
                "flex attention has no backward pass on a CPU: train with attn_implementation='sdpa' or 'eager', or "
                "run under torch.no_grad()"
            )
