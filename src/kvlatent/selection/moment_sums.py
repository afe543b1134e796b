"""Running sums of one layer's attention while a model reads text, and the hooks that feed them.

What the layer computes anyway is looked at, not computed again. Nothing here waits for the device: whether all was
finite is asked once a forward pass, of the sums.

Shapes: B blocks, T positions, R sampled rows, N query heads, K key-value heads, G = N / K, d head width, P = d / 2 channel
pairs, D model width.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.model.layer_parts import rotary_of_decoder
from kvlatent.model.projection import Projected
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.attention_rows import allowed, pair_layout, recorded_projections, rotary_of
from kvlatent.selection.statistics import LayerStatistics
from kvlatent.selection.value_bases import gated_metric, metric_root, value_errors

__all__ = ["MomentSums"]

_TEMPER = 0.5  # of the logits, for the weights of the Gram matrices: a head that looks at one token shows no variance
# under its own weights, and yet the others must go on losing by as much; over the path from the original's logits to those
# of the dropped pairs, variances under weaker weights count, too

_ROUNDING = 1e-9  # of the output energy: less than this is the rounding of an output that does not vary
_CHUNK_ON_CPU, _CHUNK_ON_GPU = (
    1 << 20,
    1 << 27,
)  # logit contributions held at once: 4 MB, as a core caches, or 512 MB


class MomentSums:
    """Running sums of one layer, in float64.

    Args:
        attention: the layer's module in the full-width twin; `rows` [B, R], on the CPU, and `positions` [B, T] are set before
            each forward.
        decoder: that the layer is of.
    """

    def __init__(self, attention: Any, decoder: Any) -> None:
        self.attention, self.decoder = attention, decoder
        heads, size, device = attention.num_heads, attention.d_qk, attention.o_proj.weight.device
        self.num_heads, self.pairs, self.device = heads, size // 2, device
        like: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.gates = torch.zeros(heads, attention.gate_width, attention.gate_width, **like)
        rotary = rotary_of_decoder(decoder) if attention.rotary is None else attention.rotary
        unrotated = size - rotary.tables[0].rotary_dim
        self.unrotated_queries = torch.zeros(heads, unrotated, unrotated, **like)
        self.unrotated_keys = torch.zeros(heads, unrotated, unrotated, **like)
        self.output_gram = torch.zeros(heads, self.pairs, self.pairs, **like)
        self.outputs = torch.zeros(heads, size, size, **like)
        self.output_means = torch.zeros(heads, size, **like)
        self.query_energy = torch.zeros(heads, self.pairs, **like)
        self.key_energy = torch.zeros(attention.num_key_value_heads, self.pairs, **like)
        self.output_energy = torch.zeros((), **like)
        self.output_sum = torch.zeros(attention.o_proj.out_features, **like)
        self.tokens = self.sampled = 0
        self.rows = self.positions = torch.zeros(0, 0, dtype=torch.long)
        self.w_o = attention.o_proj.weight.float().unflatten(1, (heads, size)).transpose(0, 1)  # [N, D, d]
        self.output_metric = self.w_o.transpose(1, 2) @ self.w_o  # [N, d, d]

    @contextmanager
    def watching(self) -> Generator[None]:
        """Collect from every forward of the layer inside."""
        with recorded_projections(self.attention) as projected:

            def add_attention(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                with torch.autocast(self.device.type, enabled=False):
                    given, hidden = projected.pop(), args[0] if args else kwargs["hidden_states"]
                    rotary = rotary_of(module, self.decoder, hidden, self.positions)
                    self.add_attention(given, rotary, self.positions)

            def read_out(averaged: Tensor, gate: Tensor | None) -> Tensor:
                output = type(self.attention).read_out(self.attention, averaged, gate)
                with torch.autocast(self.device.type, enabled=False):
                    self.add_outputs(averaged.float().flatten(0, -2), output.float().flatten(0, -2))
                return output

            hook = self.attention.register_forward_hook(add_attention, with_kwargs=True)
            self.attention.read_out = read_out
            try:
                yield
            finally:
                hook.remove()
                del self.attention.read_out

    def add_attention(self, projected: Projected, rotary: tuple[Tensor, Tensor], positions: Tensor) -> None:
        """Energies, and the Gram matrix of the sampled rows.

        Args:
            projected: what the layer made of its input; rotary: cosines and sines; positions: [B, T], or [1, T] for all blocks.
        """
        gates = self._add_gates(projected.gate)
        query, key = (apply_rotary(x.float(), *(t.float() for t in rotary)) for x in projected[:2])
        queries, keys = (pair_layout(x, rotary[0].shape[-1]) for x in (query, key))
        idle = query[..., rotary[0].shape[-1] :].transpose(0, 1).flatten(1, 2)
        self.unrotated_queries += (idle.transpose(1, 2) @ idle).double()
        self.query_energy += (queries[0].square() + queries[1].square()).sum((0, 2)).double()
        self.key_energy += (keys[0].square() + keys[1].square()).sum((0, 2)).double()
        positions = positions.expand(len(query), -1)
        rows = self.rows.to(self.device)
        seen = allowed(positions, rows, self.attention.sliding_window)
        ones = torch.ones_like(key[..., :1])
        values = torch.cat([projected[2].float(), ones], dim=-1)
        for block in range(len(query)):
            self._add_rows(
                *(x[block] for x in (query, key, values, seen, rows)),
                self.rows[block],
                rotary[0].shape[-1],
                None if gates is None else gates[block],
            )
        self.sampled += rows.numel()

    def _add_rows(
        self,
        query: Tensor,
        key: Tensor,
        values: Tensor,
        seen: Tensor,
        rows: Tensor,
        known: Tensor,
        rotary_dim: int,
        gates: Tensor | None,
    ) -> None:
        """One block, a few rows at a time: query [N, T, d], key [K, T, d], values [K, T, d + 1], seen [R, T], rows [R].

        `known` is `rows` on the CPU, so that nothing waits for the device; `gates` [N, T, d], where outputs have one.
        """
        groups, scaling = self.attention.num_key_value_groups, self.attention.scaling
        chunk = _CHUNK_ON_CPU if self.device.type == "cpu" else _CHUNK_ON_GPU
        size = max(1, chunk // (self.num_heads * seen.shape[1] * self.pairs))
        firsts, seconds = (
            half.transpose(1, 2).contiguous() for half in pair_layout(key, rotary_dim)
        )  # [K, P, T]
        for start in range(0, len(known), size):
            part = slice(start, start + size)
            end = int(known[part].max()) + 1  # no row looks further
            chosen = query[:, rows[part]].unflatten(0, (-1, groups)) * scaling  # [K, G, r, d]
            logits = chosen.flatten(1, 2) @ key[:, :end].transpose(1, 2)  # [K, G x r, T]
            logits = logits.unflatten(1, (groups, -1)).masked_fill_(~seen[part, :end], float("-inf"))
            weights = logits.mul_(_TEMPER).softmax(-1)[:, :, :, None]  # [K, G, r, 1, T]
            self._add_unrotated(weights.squeeze(3), key[:, :end, rotary_dim:])
            first, second = (half[..., None] for half in pair_layout(chosen, rotary_dim))  # [K, G, r, P, 1]
            pairs = first * firsts[:, None, None, :, :end]
            pairs.addcmul_(second, seconds[:, None, None, :, :end]).mul_(weights)  # [K, G, r, P, T]
            opened = None if gates is None else gates[:, rows[part]]
            self._add_gram(pairs, weights, values[:, :end], opened)

    def _add_unrotated(self, weights: Tensor, keys: Tensor) -> None:
        """Add second moments of keys [K, T, u], centred under the weights [K, G, r, T] of every row."""
        mean = weights @ keys[:, None]  # [K, G, r, u]
        weighed = weights.sum(2)[..., None] * keys[:, None]  # [K, G, T, u]
        moments = weighed.transpose(2, 3) @ keys[:, None] - mean.transpose(2, 3) @ mean
        self.unrotated_keys += moments.flatten(0, 1).double()

    def _add_gates(self, gate: Tensor | None) -> Tensor | None:
        """Add the second moments of the gates of all tokens; gives them as [B, N, T, d], or None where there are none."""
        if gate is None:
            return None
        opened = torch.sigmoid(gate.float()).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        flat = opened.transpose(0, 1).flatten(1, 2)
        self.gates += (flat.transpose(1, 2) @ flat).double()
        return opened

    def _add_gram(self, weighed: Tensor, weights: Tensor, values: Tensor, opened: Tensor | None) -> None:
        """Add the Gram matrix of what the pairs put out, centred over the keys under the attention weights.

        Args:
            weighed: [K, G, r, P, T], pair contributions times weights; weights: [K, G, r, 1, T]; values: [K, T, d + 1], the
                last channel 1, so that sums of contributions come with the products; opened: [N, r, d], what multiplies outputs,
                or None.
        """
        shape = weighed.shape[:-1]
        moved = (weighed.flatten(1, 3) @ values).unflatten(1, shape[1:])  # [K, G, r, P, d + 1]
        mean = (weights.flatten(1, 3) @ values[..., :-1]).unflatten(1, (*shape[1:3], 1))
        moved = torch.addcmul(moved[..., :-1], moved[..., -1:], mean, value=-1).flatten(0, 1)  # [N, r, P, d]
        if opened is not None:
            moved = moved * opened[:, :, None]
        given = moved.flatten(1, 2) @ self.output_metric  # [N, r x P, d]
        given = given.unflatten(1, moved.shape[1:3]).transpose(1, 2).flatten(2)  # [N, P, r x d]
        self.output_gram += (given @ moved.transpose(1, 2).flatten(2).transpose(1, 2)).double()

    def add_outputs(self, flat: Tensor, output: Tensor) -> None:
        """Moments of the attention-averaged values [n, N d] and of the attention's output [n, D]."""
        y = flat.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        self.outputs += (y.transpose(1, 2) @ y).double()
        self.output_means += y.sum(1).double()
        if self.attention.o_proj.bias is not None:
            output = output - self.attention.o_proj.bias.float()
        self.output_energy += output.square().sum(dtype=torch.float64)
        self.output_sum += output.sum(0, dtype=torch.float64)
        self.tokens += len(flat)

    def finite_sums(self) -> Tensor:
        """[3], finite as long as all queries, keys and attention outputs were."""
        return torch.stack([self.query_energy.sum(), self.key_energy.sum(), self.output_energy])

    def finish(self) -> LayerStatistics:
        """Sums to means."""
        outputs, groups = self.outputs / self.tokens, self.attention.num_key_value_groups
        energy = self.output_energy / self.tokens
        varying = energy - (self.output_sum / self.tokens).square().sum()
        gates = self.gates / self.tokens
        metric = gated_metric(self.output_metric.double(), gates)
        means = {
            "output_gram": self.output_gram / self.sampled,
            "outputs": outputs,
            "output_means": self.output_means / self.tokens,
            "query_energy": self.query_energy / self.tokens,
            "key_energy": self.key_energy / self.tokens,
            "value_errors": value_errors(
                metric_root(metric) if gates.numel() else self.w_o.double(), outputs, groups
            ),
            "output_energy": torch.maximum(varying, _ROUNDING * energy),
            "head_energy": self._head_energy(outputs, metric),
            "gates": gates,
            "unrotated_queries": self.unrotated_queries / self.tokens,
            "unrotated_keys": self.unrotated_keys / self.sampled,
        }
        return LayerStatistics(**{name: tensor.cpu() for name, tensor in means.items()})

    def _head_energy(self, outputs: Tensor, metric: Tensor) -> Tensor:
        """What varies of every head's share of the output, from the moments of what it averages: [N]."""
        means = self.output_means / self.tokens
        varying = outputs - means[:, :, None] * means[:, None]
        return (metric * varying).sum((1, 2)).clamp_min(0)
