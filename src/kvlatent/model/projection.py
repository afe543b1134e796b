"""The linear maps of one latent attention layer: hidden states to queries, keys and values, and attention to output.

Families differ here alone: three projections or a fused one, biases, a QK-norm. With a QK-norm at full width, queries
and keys are projected in full, normalised, and only then cut down to d_qk.

Shapes: B batch, T query positions, D model width, N query heads, K key-value heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvlatent.model.config import LatentConfig
from kvlatent.model.families import family_of, key_value_heads_of

__all__ = ["KeptChannels", "Projected", "Projections", "Rows"]


Rows = slice | Tensor
"""Which rows of a parameter: a slice, or their numbers [n]."""


class Projected(NamedTuple):
    """Queries [B, N, T, d_qk] and keys [B, K, T, d_qk] before the rotation, values [B, K, T, d_vo], and where there is an
    output gate, what its sigmoid is taken of, [B, T, N x head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None = None


class KeptChannels(nn.Module):
    """Gathers the kept channels of each head after a full-width QK-norm; owns no parameter and no buffer.

    Args:
        channels: one list of original channels for all heads, or one per key-value head.
    """

    def __init__(self, channels: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.channels = channels
        self._on_device: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor:
        """The lists as a tensor, made once on each device."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.channels, device=device)
        return self._on_device[device]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, head_dim] -> [B, T, H, d_qk]; H is N or K, each list serving the heads of its group."""
        index = self.index(x.device)
        if len(self.channels) == 1:
            return x[..., index[0].clone()]  # saved for backward, which a tensor of inference mode cannot be
        index = index.repeat_interleave(x.shape[2] // len(self.channels), dim=0)  # a new tensor, too
        return x.gather(-1, index.expand(*x.shape[:2], *index.shape))


class Projections(nn.Module):
    """Parameters of one layer's attention, under upstream's names.

    After a QK-norm, `q_map` [N, d_qk, head_dim] takes the normalised queries to the kept channels; queries are not
    cached, so it is free of any constraint. Where channels that no rotation touches are factored, `k_map` [K, r, u] takes
    the u of them to the r that are cached behind the rotated ones. Before an output gate, `v_map` [N, head_dim, d_vo] takes what narrow values
    average to back to the channels that the gate multiplies.

    Args:
        config: the latent transformers config.
        latent: the parsed `config.kv_latent`.
        layer_idx: layer number, for per-layer widths.
    """

    def __init__(self, config: Any, latent: LatentConfig, layer_idx: int) -> None:
        super().__init__()
        family, hidden = family_of(config), config.hidden_size
        self.d_qk, self.d_vo = latent.widths_at(layer_idx)
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, key_value_heads_of(config)
        gathers = latent.qk_norm == "full" and self.d_qk < latent.original_head_dim
        projected = latent.original_head_dim if gathers else self.d_qk
        self.gate_width = latent.original_head_dim if family.gates_output else 0  # a head
        self.widths = (
            self.num_heads * (projected + self.gate_width),
            self.num_key_value_heads * projected,
            self.num_key_value_heads * self.d_vo,
        )
        qkv_bias, o_bias = family.biases(config)
        self.fused_by_head = family.fused_qkv == "by head"
        if family.fused_qkv:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, self.widths[0], bias=qkv_bias)
            self.k_proj = nn.Linear(hidden, self.widths[1], bias=qkv_bias)
            self.v_proj = nn.Linear(hidden, self.widths[2], bias=qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * (self.gate_width or self.d_vo), hidden, bias=o_bias)
        self.v_map: nn.Parameter | None = None
        if self.d_vo < self.gate_width:
            self.v_map = nn.Parameter(torch.empty(self.num_heads, self.gate_width, self.d_vo))
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.kept: KeptChannels | None = None
        self.q_map: nn.Parameter | None = None
        self.k_map: nn.Parameter | None = None
        self.unrotated_from = projected
        self.norms_all_heads = family.qk_norm == "all heads"
        if family.qk_norm:
            norm, epsilon = family.upstream("RMSNorm"), family.number(config, "norm_epsilon")
            heads = (self.num_heads, self.num_key_value_heads) if self.norms_all_heads else (1, 1)
            self.q_norm, self.k_norm = (norm(each * projected, eps=epsilon) for each in heads)
        if gathers:
            channels, rotated = latent.channels_at(layer_idx), latent.tables_at(layer_idx)[0].rotary_dim
            if latent.unrotated == "factored" and rotated < self.d_qk:
                self.unrotated_from = channels[0][rotated]
                idle = projected - self.unrotated_from
                self.k_map = nn.Parameter(torch.empty(self.num_key_value_heads, self.d_qk - rotated, idle))
                channels = tuple(kept[:rotated] for kept in channels)
            self.kept = KeptChannels(channels)
            self.q_map = nn.Parameter(torch.empty(self.num_heads, self.d_qk, projected))

    def project(self, hidden_states: Tensor) -> Projected:
        """Queries, keys and values of hidden states [B, T, D], and the output gate."""
        gate = None
        if self.fused_by_head:
            heads = self.qkv_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
            sizes = [width // self.num_heads for width in self.widths]
            query, key, value = heads.split(sizes, dim=-1)
        elif hasattr(self, "qkv_proj"):
            query, key, value = self.qkv_proj(hidden_states).split(self.widths, dim=-1)
        else:
            query, key, value = (linear(hidden_states) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.gate_width:
            query, gate = self._split_gate(query)
        return Projected(self._heads("q", query), self._heads("k", key), self._heads("v", value), gate)

    def _split_gate(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and gate out of what `q_proj` puts out, which alternate by head."""
        heads = flat.view(*flat.shape[:-1], self.num_heads, -1)
        query, gate = heads.split((heads.shape[-1] - self.gate_width, self.gate_width), dim=-1)
        return query, gate.reshape(*flat.shape[:-1], -1)

    def read_out(self, averaged: Tensor, gate: Tensor | None) -> Tensor:
        """The attention's output [B, T, D] from what its heads average, [B, T, N x d_vo]."""
        if self.v_map is not None:
            heads = averaged.unflatten(-1, (self.num_heads, -1))
            averaged = torch.einsum("btnv,ndv->btnd", heads, self.v_map.to(heads.dtype)).flatten(2)
        if gate is not None:
            averaged = averaged * torch.sigmoid(gate)
        return self.o_proj(averaged)

    def project_one(self, part: str, hidden_states: Tensor) -> Tensor:
        """What `project` gives as "q", "k", "v" or "gate", alone."""
        if part == "gate":
            return self._split_gate(self.q_proj(hidden_states))[1]
        if hasattr(self, "qkv_proj"):
            flat = nn.functional.linear(
                hidden_states, *(parameter[rows] for parameter, rows in self.parameters_of(part))
            )
        else:
            flat = getattr(self, f"{part}_proj")(hidden_states)
        if part == "q" and self.gate_width:
            flat, _ = self._split_gate(flat)
        return self._heads(part, flat)

    def _heads(self, part: str, flat: Tensor) -> Tensor:
        """Projected [B, T, H x width] or [B, T, H, width] to [B, H, T, width], normalised and cut down where that is done."""
        heads = self.num_heads if part == "q" else self.num_key_value_heads
        norm = {"q": self.q_norm, "k": self.k_norm, "v": None}[part]
        if norm is not None and self.norms_all_heads:
            flat, norm = norm(flat), None
        x = flat if flat.dim() == 4 else flat.view(*flat.shape[:-1], heads, -1)
        if norm is not None:
            x = norm(x)
        if part == "q" and self.q_map is not None:
            x = torch.einsum("btnh,nqh->btnq", x, self.q_map.to(x.dtype))
        if part == "k" and self.kept is not None:
            idle = x[..., self.unrotated_from :]
            x = self.kept(x)
            if self.k_map is not None:
                x = torch.cat([x, torch.einsum("btkh,krh->btkr", idle, self.k_map.to(x.dtype))], dim=-1)
        return x.transpose(1, 2)

    def parameters_of(self, part: str) -> list[tuple[nn.Parameter, Rows]]:
        """Weight and, where there is one, bias that project to "q", "k" or "v", each with the rows that do."""
        if part == "q" and self.gate_width:
            sizes = (self.widths[0] // self.num_heads - self.gate_width, self.gate_width)
            rows = _rows_by_head(self.num_heads, sizes, 0)
            return [(parameter, rows) for parameter in self.q_proj.parameters()]
        if not hasattr(self, "qkv_proj"):
            return [(parameter, slice(None)) for parameter in getattr(self, f"{part}_proj").parameters()]
        index = "qkv".index(part)
        start = sum(self.widths[:index])
        rows: Rows = slice(start, start + self.widths[index])
        if self.fused_by_head:
            sizes = tuple(width // self.num_heads for width in self.widths)
            rows = _rows_by_head(self.num_heads, sizes, index)
        return [(parameter, rows) for parameter in self.qkv_proj.parameters()]


def _rows_by_head(heads: int, sizes: tuple[int, ...], index: int) -> Tensor:
    """Numbers of the rows of one part of a projection that puts out, for each head, parts of these sizes."""
    within = torch.arange(sizes[index]) + sum(sizes[:index])
    return (torch.arange(heads)[:, None] * sum(sizes) + within).flatten()
