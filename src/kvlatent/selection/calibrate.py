"""One pass over text that collects what selection, factoring, alignment and planning need to know of a model.

The model runs as its full-width latent twin (exact, sharing every tensor), whose attention modules speak one language
for all families. Hooks look at what enters and leaves them; nothing is kept but sums.

Shapes: N query heads, K key-value heads, G = N / K, d head width, P = d / 2 channel pairs, T positions, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kvlatent.jobs.fingerprints import model_fingerprint
from kvlatent.jobs.progress import Progress
from kvlatent.model.assembly import full_width
from kvlatent.model.families import parts_of
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.attention_rows import allowed, pair_layout
from kvlatent.selection.statistics import LayerStatistics, Statistics
from kvlatent.selection.value_bases import value_errors

__all__ = ["calibrate"]

_ROUNDING = 1e-9  # of the output energy: less than this is the rounding of an output that does not vary
_CHUNK = 1 << 21  # logit contributions held at once: 8 MB in float32


@torch.no_grad()
def calibrate(
    model: Any,
    blocks: Any,
    *,
    rows: int = 32,
    seed: int = 0,
    progress: Progress | Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of `model` over `blocks`; the model is left as it was.

    Args:
        model: the original, a causal language model of a supported family.
        blocks: from `kvlatent.text`, or anything whose `[i : j]` has `input_ids` and `position_ids`, [j - i, T];
            positions that restart at 0 separate documents.
        rows: query positions sampled a block for the Gram matrices; 0 < rows. Memory and time grow with
            rows x T, not with T squared.
        seed: of the sampling.
        progress: told after every block; a function is called with the blocks done and their number.

    Raises:
        ValueError: too little text for the rank of the statistics, activations that are not finite, or a model that
            is not supported.
    """
    if rows < 1:
        raise ValueError(f"calibration samples at least 1 query row a block: got rows={rows}; try 32")
    twin = full_width(model).eval()
    columns = blocks[0 : len(blocks)] if not isinstance(blocks, dict) else blocks
    ids, positions = (torch.as_tensor(columns[name]) for name in ("input_ids", "position_ids"))
    attentions = [parts_of(twin.model, layer).attention for layer in range(len(twin.model.layers))]
    needed = attentions[0].o_proj.in_features
    if ids.numel() < needed:
        raise ValueError(
            f"calibration needs at least num_attention_heads x head_dim = {needed} tokens, the rank of its largest "
            f"statistic: got {ids.numel()}; give more text or more blocks"
        )
    sums = [_MomentSums(attention) for attention in attentions]
    generator = torch.Generator().manual_seed(seed)
    told = Progress.of(progress, ("done", "total"))
    counter = told.step("calibrate", len(ids), tokens=ids.shape[1])
    with ExitStack() as hooks:
        for attention, one in zip(attentions, sums, strict=True):
            hooks.callback(attention.register_forward_pre_hook(one.add_attention, with_kwargs=True).remove)
            hooks.callback(attention.o_proj.register_forward_pre_hook(one.add_outputs).remove)
        for block in range(len(ids)):
            chosen = torch.randperm(ids.shape[1], generator=generator)[:rows].sort().values
            for index, one in enumerate(sums):
                one.place = f"layer {index}, block {block}"
                one.rows = chosen.to(model.device)
            batch = {"input_ids": ids[block, None], "position_ids": positions[block, None]}
            given = twin.model(**{name: t.to(model.device) for name, t in batch.items()}, use_cache=False)
            sums[-1].check(given.last_hidden_state, "final hidden states")
            counter.advance()
    return Statistics(
        tuple(one.finish() for one in sums),
        ids.to("cpu", torch.int32),
        positions.to("cpu", torch.int32),
        model_fingerprint(model),
        attentions[0].num_key_value_heads,
        attentions[0].d_qk,
    )


class _MomentSums:
    """Running sums of one layer, in float64, and the hooks that feed them."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        heads, size = attention.num_heads, attention.d_qk
        self.num_heads, self.pairs = heads, size // 2
        like: dict[str, Any] = {"dtype": torch.float64, "device": attention.o_proj.weight.device}
        self.output_gram = torch.zeros(heads, self.pairs, self.pairs, **like)
        self.outputs = torch.zeros(heads, size, size, **like)
        self.output_means = torch.zeros(heads, size, **like)
        self.query_energy = torch.zeros(heads, self.pairs, **like)
        self.key_energy = torch.zeros(attention.num_key_value_heads, self.pairs, **like)
        self.output_energy = torch.zeros((), **like)
        self.output_sum = torch.zeros(attention.o_proj.out_features, **like)
        self.tokens = self.sampled = 0
        self.place, self.rows = "", torch.zeros(0, dtype=torch.long)
        self.w_o = attention.o_proj.weight.float().unflatten(1, (heads, size)).transpose(0, 1)  # [N, D, d]
        self.output_metric = self.w_o.transpose(1, 2) @ self.w_o  # [N, d, d]

    def add_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the attention module: energies, and the Gram matrix of the sampled rows (one block)."""
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        query, key, value = self.attention.project(hidden)
        query, key = (apply_rotary(x, cos, sin).float()[0] for x in (query, key))
        self.check(query, "queries")
        self.check(key, "keys")
        rotary_dim = cos.shape[-1]
        queries, keys = pair_layout(query, rotary_dim), pair_layout(key, rotary_dim)
        self.query_energy += (queries[0].square() + queries[1].square()).sum(1).double()
        self.key_energy += (keys[0].square() + keys[1].square()).sum(1).double()
        seen = allowed(kwargs["position_ids"], self.rows[None], self.attention.sliding_window)[0]
        groups = self.attention.num_key_value_groups
        whole = key.repeat_interleave(groups, dim=0)
        firsts, seconds = (half.repeat_interleave(groups, dim=0) for half in keys)
        values = value.float()[0].repeat_interleave(groups, dim=0)
        for part, mask in self._chunks(seen):
            end = int(part.max()) + 1  # no row looks further
            mask, chosen = mask[:, :end], query[:, part]
            logits = (chosen @ whole[:, :end].transpose(1, 2)) * self.attention.scaling
            weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
            pairs = queries[0][:, part, None] * firsts[:, None, :end]
            pairs += queries[1][:, part, None] * seconds[:, None, :end]
            self._add_gram(pairs * self.attention.scaling, weights, values[:, :end])
        self.sampled += len(self.rows)

    def _chunks(self, seen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Sampled rows a few at a time, so that [N, r, T, P] stays small."""
        size = max(1, _CHUNK // (self.num_heads * seen.shape[1] * self.pairs))
        yield from zip(self.rows.split(size), seen.split(size), strict=True)

    def _add_gram(self, pairs: Tensor, weights: Tensor, values: Tensor) -> None:
        """Add the Gram matrix of what pair contributions [N, r, T, P] under attention weights [N, r, T] put out."""
        pairs = pairs - (weights[..., None] * pairs).sum(2, keepdim=True)
        moved = (pairs * weights[..., None]).transpose(2, 3) @ values[:, None]  # [N, r, P, d]
        weighed = (moved @ self.output_metric[:, None]).transpose(1, 2).flatten(2)
        self.output_gram += (weighed @ moved.transpose(1, 2).flatten(2).transpose(1, 2)).double()

    def add_outputs(self, module: nn.Module, args: tuple) -> None:
        """Pre-hook of the output projection: moments of the attention-averaged values."""
        flat = args[0].float()[0]
        self.check(flat, "attention outputs")
        y = flat.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        self.outputs += (y.transpose(1, 2) @ y).double()
        self.output_means += y.sum(1).double()
        output = (flat @ self.w_o.transpose(0, 1).flatten(1).T).double()
        self.output_energy += output.square().sum()
        self.output_sum += output.sum(0)
        self.tokens += len(flat)

    def check(self, x: Tensor, what: str) -> None:
        if not torch.isfinite(x).all():
            raise ValueError(
                f"calibration met {what} that are NaN or infinite ({self.place}); the weights are broken or the dtype "
                "overflows, try float32"
            )

    def finish(self) -> LayerStatistics:
        """Sums to means."""
        outputs, groups = self.outputs / self.tokens, self.attention.num_key_value_groups
        energy = self.output_energy / self.tokens
        varying = energy - (self.output_sum / self.tokens).square().sum()
        means = {
            "output_gram": self.output_gram / self.sampled,
            "outputs": outputs,
            "output_means": self.output_means / self.tokens,
            "query_energy": self.query_energy / self.tokens,
            "key_energy": self.key_energy / self.tokens,
            "value_errors": value_errors(self.w_o.double(), outputs, groups),
            "output_energy": torch.maximum(varying, _ROUNDING * energy),
            "head_energy": self._head_energy(outputs),
        }
        return LayerStatistics(**{name: tensor.cpu() for name, tensor in means.items()})

    def _head_energy(self, outputs: Tensor) -> Tensor:
        """What varies of every head's share of the output, from the moments of what it averages: [N]."""
        means = self.output_means / self.tokens
        varying = outputs - means[:, :, None] * means[:, None]
        return (self.output_metric.double() * varying).sum((1, 2)).clamp_min(0)
